//! The user namespace of a pod's containers (user_namespaces(7)) and, since
//! root of a container may only change what belongs to it, the pod's network,
//! IPC and UTS namespaces.
//!
//! A short-lived process makes them: it is in the user namespace before it
//! makes the others. The agent then takes the others for itself, so that all
//! it does for the pod happens there, while it stays in the guest's own user
//! namespace. [`crate::sandbox`] is the only one to make them; processes get
//! in by [`crate::container`].

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{read, write};

use crate::sys::{self, Cloned};

/// What belongs to the user namespace beside processes.
const OWNED: CloneFlags = CloneFlags::CLONE_NEWNET
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

#[derive(Debug, thiserror::Error)]
pub enum UserNsError {
    #[error("{length} ids from {host_id} on are none or reach beyond the highest id")]
    Range { host_id: u32, length: u32 },
    #[error("cannot make a process for a user namespace")]
    Clone(#[source] Errno),
    #[error("cannot map the ids of a user namespace")]
    Map(#[source] io::Error),
    #[error("cannot make the namespaces that belong to a user namespace")]
    Make(#[source] Errno),
    #[error("cannot enter the pod's namespaces")]
    Enter(#[source] Errno),
}

/// Ids of containers from 0 on, and what they are in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    host_id: u32,
    length: u32,
}

impl IdRange {
    pub fn parse(request: &agent_api::UserNamespace) -> Result<Self, UserNsError> {
        let agent_api::UserNamespace { host_id, length } = *request;
        // The highest number means "unchanged" to the kernel.
        let fits = length > 0 && host_id.checked_add(length).is_some();
        fits.then_some(Self { host_id, length })
            .ok_or(UserNsError::Range { host_id, length })
    }

    /// Id `id` of a container as it is in the guest.
    pub fn in_guest(self, id: u32) -> Option<u32> {
        (id < self.length).then(|| self.host_id + id)
    }

    /// Root of a container.
    pub fn root(self) -> u32 {
        self.host_id
    }

    pub fn length(self) -> u32 {
        self.length
    }
}

#[derive(Debug)]
pub struct UserNamespace {
    fd: OwnedFd,
    ids: IdRange,
}

impl UserNamespace {
    pub fn ids(&self) -> IdRange {
        self.ids
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The process that holds new namespaces until they are entered or dropped.
#[derive(Debug)]
pub struct Holder {
    pid: i32,
    pidfd: OwnedFd,
    user: UserNamespace,
    /// Its end ends the process.
    _channel: OwnedFd,
}

impl Holder {
    pub fn start(ids: IdRange) -> Result<Self, UserNsError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(UserNsError::Clone)?;
        // SAFETY: the child runs `hold`, which neither allocates nor locks and
        // never returns.
        let cloned = unsafe { sys::clone_process(libc::CLONE_NEWUSER as u64, None) };
        let (pid, pidfd) = match cloned.map_err(UserNsError::Clone)? {
            Cloned::Child => hold(&ours, &theirs),
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
        drop(theirs);
        let map = format!("0 {} {}\n", ids.host_id, ids.length);
        for file in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{pid}/{file}"), &map).map_err(UserNsError::Map)?;
        }
        let fd = File::open(format!("/proc/{pid}/ns/user")).map_err(UserNsError::Map)?;
        // It makes its namespaces in a few milliseconds, and nothing else goes
        // on in a guest that is being made a pod.
        let mut answer = [0; 4];
        let told = write(&ours, &[1]).and_then(|_| read(&ours, &mut answer));
        match told.map_err(UserNsError::Make)? {
            4 => {}
            _ => return Err(UserNsError::Make(Errno::ESRCH)),
        }
        match i32::from_ne_bytes(answer) {
            0 => Ok(Self {
                pid,
                pidfd,
                user: UserNamespace { fd: fd.into(), ids },
                _channel: ours,
            }),
            errno => Err(UserNsError::Make(Errno::from_raw(errno))),
        }
    }

    /// Its number, for what is to be moved into its network namespace.
    pub fn pid(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// Makes the pod's network, IPC and UTS namespaces those of this thread,
    /// which is the agent's only one that works for the pod.
    pub fn enter(self) -> Result<UserNamespace, UserNsError> {
        sys::setns(self.pidfd.as_raw_fd(), OWNED.bits()).map_err(UserNsError::Enter)?;
        Ok(self.user)
    }
}

/// The way of the holding process.
fn hold(parents: &OwnedFd, channel: &OwnedFd) -> ! {
    let make = || -> sys::Result<()> {
        // Else it would itself keep open what its end is told by.
        sys::close_range(parents.as_raw_fd(), parents.as_raw_fd())?;
        if read(channel, &mut [0])? != 1 {
            return Err(Errno::ECANCELED);
        }
        // The maps are there now, so what it makes belongs to their root.
        become_root()?;
        unshare(OWNED)
    };
    let errno = make().err().map_or(0, |errno| errno as i32);
    // A parent that has gone needs no answer, and its end is what is waited
    // for.
    let _ = write(channel, &errno.to_ne_bytes());
    let _ = read(channel, &mut [0]);
    // SAFETY: ends the process without running the parent's exit handlers.
    unsafe { libc::_exit(0) }
}

/// From the ids of the guest, which its user namespace does not know, to root
/// of it. Allocates nothing.
pub fn become_root() -> sys::Result<()> {
    // The system calls, not libc's functions: those tell every thread.
    // SAFETY: takes integers and an empty list.
    unsafe {
        let none = std::ptr::null::<libc::gid_t>();
        Errno::result(libc::syscall(libc::SYS_setgroups, 0, none))?;
        Errno::result(libc::syscall(libc::SYS_setresgid, 0, 0, 0))?;
        Errno::result(libc::syscall(libc::SYS_setresuid, 0, 0, 0)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(host_id: u32, length: u32) -> Result<IdRange, UserNsError> {
        IdRange::parse(&agent_api::UserNamespace { host_id, length })
    }

    #[test]
    fn ids_are_those_of_the_range() {
        let ids = parse(100_000, 65_536).unwrap();
        assert_eq!(ids.in_guest(0), Some(100_000));
        assert_eq!(ids.in_guest(65_535), Some(165_535));
        assert_eq!(ids.in_guest(65_536), None);
        assert_eq!(ids.in_guest(u32::MAX), None);
    }

    #[test]
    fn a_range_is_neither_empty_nor_holds_the_highest_number() {
        for (host_id, length) in [(1000, 0), (u32::MAX, 1), (1, u32::MAX)] {
            let refused = parse(host_id, length);
            assert!(
                matches!(refused, Err(UserNsError::Range { .. })),
                "{host_id}"
            );
        }
        assert!(parse(0, u32::MAX).is_ok());
        assert!(parse(u32::MAX - 1, 1).is_ok());
    }
}
