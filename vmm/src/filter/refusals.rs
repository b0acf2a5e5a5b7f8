//! The calls that a filter refuses by asking: answered and remembered here.

use std::collections::BTreeSet;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;

use super::calls;

/// Different calls that are told: enough to know a kernel that does not fit, or
/// one that attacks.
const NAMES: usize = 16;
/// Calls that are answered. Whoever goes on asking does not cost us more: the
/// kernel refuses without us.
const ANSWERS: u32 = 1024;

/// SECCOMP_IOC_MAGIC of linux/seccomp.h.
const MAGIC: u8 = b'!';
nix::ioctl_readwrite!(receive, MAGIC, 0, libc::seccomp_notif);
nix::ioctl_readwrite!(send, MAGIC, 1, libc::seccomp_notif_resp);

/// The listener of a filter whose refused calls wait for an answer.
pub struct Refusals {
    listener: OwnedFd,
    names: BTreeSet<i32>,
    answered: u32,
}

/// What came of a look at the listener.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// A call that was not refused before, by its name.
    First(String),
    /// One that was, or that is one too many to be told.
    Again,
    /// Nobody is left to ask, or it has been often enough: to be dropped.
    Enough,
}

impl Refusals {
    #[must_use]
    pub fn new(listener: OwnedFd) -> Self {
        Self {
            listener,
            names: BTreeSet::new(),
            answered: 0,
        }
    }

    /// Refuses one call, EPERM; to be called when epoll has just told of the
    /// listener, or it may wait.
    pub fn answer(&mut self, told: EpollFlags) -> io::Result<Refused> {
        if self.answered == ANSWERS {
            return Ok(Refused::Enough);
        }
        if !told.contains(EpollFlags::EPOLLIN) {
            let alone = told.contains(EpollFlags::EPOLLHUP);
            return Ok(if alone {
                Refused::Enough
            } else {
                Refused::Again
            });
        }
        // SAFETY: all-zero bytes are a valid notification, and what the kernel
        // asks for.
        let mut asked: libc::seccomp_notif = unsafe { mem::zeroed() };
        // SAFETY: the kernel writes one notification.
        match unsafe { receive(self.listener.as_raw_fd(), &raw mut asked) } {
            // Whoever asked was killed meanwhile.
            Err(Errno::ENOENT | Errno::EINTR) => return Ok(Refused::Again),
            other => other?,
        };
        let mut refusal = libc::seccomp_notif_resp {
            id: asked.id,
            val: 0,
            error: -libc::EPERM,
            flags: 0,
        };
        // SAFETY: the kernel reads one response.
        match unsafe { send(self.listener.as_raw_fd(), &raw mut refusal) } {
            Err(Errno::ENOENT) => {}
            other => drop(other?),
        }
        self.answered += 1;
        let number = asked.data.nr;
        if self.names.len() == NAMES || !self.names.insert(number) {
            return Ok(Refused::Again);
        }
        Ok(Refused::First(calls::name(i64::from(number))))
    }
}

impl AsFd for Refusals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}
