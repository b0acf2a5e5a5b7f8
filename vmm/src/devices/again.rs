//! A device's wake-up to itself: it leaves what is too much for one turn for a
//! later one, so that other devices of its loop have theirs.

use std::io;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Poller;

pub(crate) struct Again(EventFd);

impl Again {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_flags(flags)?))
    }

    /// Has the device called with `token` after [`Again::ring`].
    pub(crate) fn watch(&self, poller: &Poller, token: u32) -> io::Result<()> {
        poller.add(&self.0, token, EpollFlags::EPOLLIN)
    }

    pub(crate) fn ring(&self) -> io::Result<()> {
        self.0.write(1)?;
        Ok(())
    }

    /// The turn has come. Spurious at worst: the queues are what counts.
    pub(crate) fn take(&self) -> io::Result<()> {
        match self.0.read() {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}
