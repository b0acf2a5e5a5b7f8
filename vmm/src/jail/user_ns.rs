//! A user namespace for the guest's kernel where that is a process (`uml`).
//! Its one user is the pod's, and nobody can make a namespace in it, so that
//! no capability can be had there and in no other one.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use caps::CapSet;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Uid, fork, setresgid, setresuid};
use vmm_client::packet::send;

use crate::packet::recv;

/// Each limits the namespaces of a kind below the one it is written in.
const LIMITS: [&str; 8] = ["user", "pid", "net", "mnt", "ipc", "uts", "cgroup", "time"];

/// Makes it. To be called as root, with the node's /proc, and before any thread
/// exists. Its owner is `uid`, so that `uid` may enter it.
pub fn make(uid: u32, gid: u32) -> io::Result<OwnedFd> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    // SAFETY: this process has one thread, so the child has all that it locks.
    let child = match unsafe { fork() }? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let said = match be_first(uid, gid) {
                Ok(namespace) => send(&theirs, &Said::Ok(()), &[namespace.as_fd()]),
                Err(error) => send(&theirs, &Said::Err(error.to_string()), &[]),
            };
            // SAFETY: it ends the process, and runs nothing of the parent's.
            unsafe { libc::_exit(i32::from(said.is_err())) }
        }
    };
    drop(theirs);
    let made = hear(&ours);
    waitpid(child, None)?;
    made
}

/// What comes beside the namespace.
type Said = Result<(), String>;

fn hear(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let Some((said, fds)) = recv::<Said>(socket)? else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    said.map_err(io::Error::other)?;
    let fd = fds.into_iter().next();
    fd.ok_or_else(|| io::Error::other("no namespace came"))
}

/// The life of its first process. It keeps root's capabilities until it is
/// inside: a node may let only those who have them make a user namespace.
fn be_first(uid: u32, gid: u32) -> io::Result<fs::File> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    prctl::set_keepcaps(true)?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    let kept = caps::read(None, CapSet::Permitted).map_err(io::Error::other)?;
    caps::set(None, CapSet::Effective, &kept).map_err(io::Error::other)?;
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|e| at("unshare", e.into()))?;
    // Its files in /proc become its own again.
    prctl::set_dumpable(true)?;
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("{uid} {uid} 1"))?;
    write("/proc/self/gid_map", &format!("{gid} {gid} 1"))?;
    for kind in LIMITS {
        match write(&format!("/proc/sys/user/max_{kind}_namespaces"), "0") {
            // Not a kind that this node's kernel has.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    fs::File::open("/proc/self/ns/user")
}

fn write(path: &str, text: &str) -> io::Result<()> {
    fs::write(path, text).map_err(|e| at(path, e))
}

fn at(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
