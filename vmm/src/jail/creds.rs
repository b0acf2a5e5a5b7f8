//! From root to what a process of the pod may be.

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::{JailError, step};

/// What the file server needs to act for the guest's users inside the shared
/// directory. Not DAC_READ_SEARCH: with it a process can open any inode of a
/// file system by its handle. Not MKNOD: no guest makes a device of the node.
pub const OF_FILE_SERVER: [Capability; 7] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

/// Takes the pod's uid and gid, for good, and lets go of every capability.
pub(super) fn become_the_pod(uid: u32, gid: u32) -> Result<(), JailError> {
    own_keyring()?;
    limit_capabilities(&CapsHashSet::new())?;
    setgroups(&[]).map_err(step("leave supplementary groups"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid).map_err(step("take the pod's gid"))?;
    setresuid(uid, uid, uid).map_err(step("take the pod's uid"))?;
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(failed("let go of capabilities"))?;
    }
    finish()
}

/// Takes the pod's uid and gid as the real ones, and keeps those of root and a
/// few capabilities.
///
/// `virtiofsd` creates a file as the guest's user by taking over that user's
/// effective ids for the call, with one exception: for uid 0 it stays what it
/// is. So it has to be root to begin with, or files of the guest's root would
/// be the pod's uid's:
///
/// - effective 0 → files made by the guest's root are root's;
/// - saved 0 → the way back from a user's id, for which no capability is left:
///   going from 0 to another effective uid empties the effective set, so a
///   user's request is checked as the user's, and coming back fills it from
///   the permitted set (capabilities(7));
/// - the real uid is the pod's.
pub(super) fn become_the_file_server(uid: u32, gid: u32) -> Result<(), JailError> {
    let kept = OF_FILE_SERVER.into_iter().collect();
    own_keyring()?;
    limit_capabilities(&kept)?;
    setgroups(&[]).map_err(step("leave supplementary groups"))?;
    let (root, root_group) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(Gid::from_raw(gid), root_group, root_group).map_err(step("take the pod's gid"))?;
    setresuid(Uid::from_raw(uid), root, root).map_err(step("take the pod's uid"))?;
    caps::clear(None, CapSet::Inheritable).map_err(failed("clear inheritable capabilities"))?;
    // Effective first: it must stay within what is permitted.
    caps::set(None, CapSet::Effective, &kept).map_err(failed("reduce capabilities"))?;
    caps::set(None, CapSet::Permitted, &kept).map_err(failed("reduce capabilities"))?;
    finish()
}

/// No program executed from here on can have more than `kept`.
fn limit_capabilities(kept: &CapsHashSet) -> Result<(), JailError> {
    for cap in caps::all() {
        let bounded = caps::has_cap(None, CapSet::Bounding, cap).unwrap_or(false);
        if bounded && !kept.contains(&cap) {
            caps::drop(None, CapSet::Bounding, cap).map_err(failed("limit capabilities"))?;
        }
    }
    Ok(())
}

/// Leaves the daemon's session keyring for one of its own.
fn own_keyring() -> Result<(), JailError> {
    let anonymous: *const libc::c_char = std::ptr::null();
    // SAFETY: a null name asks for a new, anonymous keyring; nothing is read.
    let joined = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING,
            anonymous,
        )
    };
    if joined >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // A node without keyrings, or a container that is refused them: then
        // this process is as well.
        Some(libc::ENOSYS | libc::EPERM) => Ok(()),
        _ => Err(step("join a session keyring of its own")(error)),
    }
}

/// After the last change of ids, which decides whether others of the same uid
/// may look into this process.
fn finish() -> Result<(), JailError> {
    prctl::set_dumpable(false).map_err(step("keep others of its uid out"))?;
    prctl::set_no_new_privs().map_err(step("set no_new_privs"))
}

fn failed(what: &'static str) -> impl FnOnce(caps::errors::CapsError) -> JailError {
    move |source| JailError::Step {
        step: what,
        source: std::io::Error::other(source),
    }
}
