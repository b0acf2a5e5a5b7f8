//! From root to the pod's uid.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::{JailError, step};

/// What virtio-fs needs to act for the guest's users inside the shared
/// directory. Not DAC_READ_SEARCH: with it a process can open any inode of a
/// file system by its handle. The guest's kernel gets none: they are not
/// inheritable.
pub(crate) const KEPT: [Capability; 8] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

pub(super) fn drop_privileges(uid: u32, gid: u32) -> Result<(), JailError> {
    let kept: CapsHashSet = KEPT.into_iter().collect();
    for cap in caps::all() {
        let bounded = caps::has_cap(None, CapSet::Bounding, cap).unwrap_or(false);
        if bounded && !kept.contains(&cap) {
            caps::drop(None, CapSet::Bounding, cap).map_err(failed("limit capabilities"))?;
        }
    }
    prctl::set_keepcaps(true).map_err(step("keep capabilities across setuid"))?;
    setgroups(&[]).map_err(step("leave supplementary groups"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid).map_err(step("take the pod's gid"))?;
    setresuid(uid, uid, uid).map_err(step("take the pod's uid"))?;
    caps::clear(None, CapSet::Inheritable).map_err(failed("clear inheritable capabilities"))?;
    // Effective first: it must stay within what is permitted.
    caps::set(None, CapSet::Effective, &kept).map_err(failed("reduce capabilities"))?;
    caps::set(None, CapSet::Permitted, &kept).map_err(failed("reduce capabilities"))?;
    prctl::set_no_new_privs().map_err(step("set no_new_privs"))
}

fn failed(what: &'static str) -> impl FnOnce(caps::errors::CapsError) -> JailError {
    move |source| JailError::Step {
        step: what,
        source: std::io::Error::other(source),
    }
}
