//! Landlock: of files, ports, sockets and signals to others, nothing.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};
use unpacker_client::Missing;

use super::{JailError, step};

/// The newest that is known; a kernel with less gives what it has.
const NEWEST: ABI = ABI::V10;
/// Linux 6.12: less than this is told.
const ASKED: ABI = ABI::V6;

/// What of it the node's kernel lacks.
pub(super) fn restrict() -> Result<Option<Missing>, JailError> {
    let status = handling(NEWEST, CompatLevel::BestEffort)
        .and_then(Ruleset::create)
        .and_then(|rules| rules.restrict_self())
        .map_err(|error| step("restrict itself by Landlock")(io::Error::other(error)))?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Ok(Some(Missing::Landlock));
    }
    let has_asked = handling(ASKED, CompatLevel::HardRequirement).is_ok();
    Ok((!has_asked).then_some(Missing::PartOfLandlock))
}

fn handling(abi: ABI, level: CompatLevel) -> Result<Ruleset, RulesetError> {
    Ruleset::default()
        .set_compatibility(level)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))
}
