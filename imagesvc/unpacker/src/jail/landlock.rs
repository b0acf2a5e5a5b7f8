//! Landlock: of files, ports, sockets and signals to others, nothing.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};

use super::{JailError, step};

/// The newest that is known; a kernel with less gives what it has.
const NEWEST: ABI = ABI::V10;

/// Whether the node's kernel has it at all.
pub(super) fn restrict() -> Result<bool, JailError> {
    let failed = |error: RulesetError| step("restrict itself by Landlock")(io::Error::other(error));
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.restrict_self())
        .map_err(failed)?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
