//! From root to nobody.

use caps::CapSet;
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::{JailError, step};

pub(super) fn drop_all(uid: u32, gid: u32) -> Result<(), JailError> {
    if uid == 0 || gid == 0 {
        let source = std::io::Error::other("they are root's");
        return Err(step("take its user and group")(source));
    }
    // First, while the right to do so is there.
    clear(CapSet::Bounding)?;
    clear(CapSet::Ambient)?;
    setgroups(&[]).map_err(step("leave supplementary groups"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid).map_err(step("take its group"))?;
    setresuid(uid, uid, uid).map_err(step("take its user"))?;
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        clear(set)?;
    }
    prctl::set_no_new_privs().map_err(step("set no_new_privs"))
}

fn clear(set: CapSet) -> Result<(), JailError> {
    caps::clear(None, set).map_err(|error| step("drop capabilities")(std::io::Error::other(error)))
}
