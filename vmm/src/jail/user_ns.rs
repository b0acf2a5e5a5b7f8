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
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setresgid, setresuid};
use vmm_client::packet::send;

use crate::packet::recv;

/// Each limits the namespaces of a kind below the one it is written in.
const LIMITS: [&str; 8] = ["user", "pid", "net", "mnt", "ipc", "uts", "cgroup", "time"];

/// What the process inside says: that it is there, and then what it made.
type Said = Result<(), String>;

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
            drop(ours);
            let made = be_inside(&theirs, uid, gid);
            let status = match made {
                Ok(()) => 0,
                // Nobody else is left to tell if the parent has gone.
                Err(e) => send(&theirs, &Said::Err(e.to_string()), &[]).map_or(2, |()| 1),
            };
            // SAFETY: it ends the process, and runs nothing of the parent's.
            unsafe { libc::_exit(status) }
        }
    };
    drop(theirs);
    let made = take(&ours, child, uid, gid);
    // Without its end of the socket it ends.
    drop(ours);
    waitpid(child, None)?;
    made
}

fn take(socket: &OwnedFd, child: Pid, uid: u32, gid: u32) -> io::Result<OwnedFd> {
    hear(socket)?;
    for (map, id) in [("uid_map", uid), ("gid_map", gid)] {
        let written = fs::write(format!("/proc/{child}/{map}"), format!("{id} {id} 1"));
        written.map_err(|e| at(map, e))?;
    }
    send(socket, &Said::Ok(()), &[])?;
    let fds = hear(socket)?;
    let fd = fds.into_iter().next();
    fd.ok_or_else(|| io::Error::other("no namespace came"))
}

fn hear(socket: &OwnedFd) -> io::Result<Vec<OwnedFd>> {
    let Some((said, fds)) = recv::<Said>(socket)? else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    said.map(|()| fds).map_err(io::Error::other)
}

fn at(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// The child's life. It keeps root's capabilities until it is inside: a node
/// may let only those who have them make a user namespace.
fn be_inside(socket: &OwnedFd, uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    prctl::set_keepcaps(true)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    let kept = caps::read(None, CapSet::Permitted).map_err(io::Error::other)?;
    caps::set(None, CapSet::Effective, &kept).map_err(io::Error::other)?;
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|e| at("unshare", e.into()))?;
    send(socket, &Said::Ok(()), &[])?;
    hear(socket)?;
    for kind in LIMITS {
        let limit = format!("/proc/sys/user/max_{kind}_namespaces");
        match fs::write(&limit, "0") {
            // Not a kind that this node's kernel has.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(|e| at(&limit, e))?,
        }
    }
    let namespace = fs::File::open("/proc/self/ns/user")?;
    send(socket, &Said::Ok(()), &[namespace.as_fd()])
}
