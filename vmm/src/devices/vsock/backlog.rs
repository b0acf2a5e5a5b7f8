//! Bytes of the guest that a slow host client has not taken yet.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::MsgFlags;

use super::connection::is_retry;
use crate::devices::iov::Iov;

/// A queue of bytes; what bounds it is the credit given to the guest.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    /// Bytes at the front that were sent already.
    gone: usize,
}

impl Backlog {
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.gone
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops everything and returns the memory.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Appends `payload` but for its first `skip` bytes.
    pub(super) fn append(&mut self, payload: &Iov<'_>, skip: usize) {
        if skip >= payload.len() {
            return;
        }
        // Moving the rest to the front is paid for by the bytes that went.
        if self.gone > self.len() {
            self.bytes.drain(..self.gone);
            self.gone = 0;
        }
        let old = self.bytes.len();
        self.bytes.resize(old + payload.len(), 0);
        payload.copy_to(&mut self.bytes[old..]);
        self.bytes.drain(old..old + skip);
    }

    /// Sends as much as the socket takes.
    pub(super) fn flush(&mut self, socket: impl AsFd) -> io::Result<()> {
        while !self.is_empty() {
            match send(&socket, &self.bytes[self.gone..]) {
                Ok(n) => self.gone += n,
                Err(e) if is_retry(&e) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        self.clear();
        Ok(())
    }
}

/// Sends without blocking and without SIGPIPE.
pub(super) fn send(socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    Ok(nix::sys::socket::send(
        socket.as_fd().as_raw_fd(),
        bytes,
        flags,
    )?)
}
