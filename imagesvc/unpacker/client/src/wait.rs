//! Waiting for an unpacker, and for no longer than it gets on.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};

use crate::{Failure, Process};

/// An unpacker that takes and gives no byte for so long hangs: a disk that
/// stands still for that long is broken.
pub const NO_PROGRESS: Duration = Duration::from_secs(300);

/// Tells everybody who holds its [`Stop`] to stop, by being dropped.
#[derive(Debug)]
pub struct Stopper(#[expect(dead_code, reason = "its end is what counts")] PipeWriter);

/// Ends every wait once its [`Stopper`] is gone.
#[derive(Debug)]
pub struct Stop(PipeReader);

/// # Errors
/// No descriptor is to be had.
pub fn stopper() -> io::Result<(Stopper, Stop)> {
    let (reader, writer) = io::pipe()?;
    Ok((Stopper(writer), Stop(reader)))
}

/// What bounds all waits of one job.
#[derive(Debug)]
pub struct Watch<'a> {
    stop: &'a Stop,
    patience: Duration,
    /// Bytes that went anywhere.
    moved: AtomicU64,
}

impl<'a> Watch<'a> {
    #[must_use]
    pub fn new(stop: &'a Stop, patience: Duration) -> Self {
        Self {
            stop,
            patience,
            moved: AtomicU64::new(0),
        }
    }

    /// Reads what is there for `process`, once there is something; 0 at the
    /// end. Waits as long as it takes: an unpacker that is given nothing has
    /// nothing to say.
    ///
    /// # Errors
    /// [`Failure::Unread`] if the process has spoken or died: it takes no more.
    /// [`Failure::Stopped`], or of the pipe, which does not block.
    pub fn read(
        &self,
        from: impl AsFd,
        process: &Process,
        buffer: &mut [u8],
    ) -> Result<usize, Failure> {
        loop {
            self.until(from.as_fd(), PollFlags::IN, Some(process.socket()), None)?;
            match read(&from, &mut *buffer) {
                Ok(len) => {
                    self.moved.fetch_add(len as u64, Ordering::Relaxed);
                    return Ok(len);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(Failure::Pipe(error.into())),
            }
        }
    }

    /// Writes all of `bytes` to a pipe that does not block.
    ///
    /// # Errors
    /// [`Failure::Unread`] if nobody reads it; else as its waits end.
    pub fn write(&self, to: impl AsFd, mut bytes: &[u8]) -> Result<(), Failure> {
        while !bytes.is_empty() {
            self.until(to.as_fd(), PollFlags::OUT, None, Some(self.patience))?;
            match write(&to, bytes) {
                Ok(len) => {
                    self.moved.fetch_add(len as u64, Ordering::Relaxed);
                    bytes = &bytes[len..];
                }
                Err(Errno::PIPE) => return Err(Failure::Unread),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(Failure::Pipe(error.into())),
            }
        }
        Ok(())
    }

    /// Returns once there is a message, or nobody left to send one.
    pub(crate) fn message(
        &self,
        socket: BorrowedFd<'_>,
        patience: Duration,
    ) -> Result<(), Failure> {
        self.until(socket, PollFlags::IN, None, Some(patience))
    }

    fn until(
        &self,
        fd: BorrowedFd<'_>,
        flags: PollFlags,
        process: Option<BorrowedFd<'_>>,
        patience: Option<Duration>,
    ) -> Result<(), Failure> {
        let timeout = match patience.map(Timespec::try_from) {
            Some(Ok(timeout)) => Some(timeout),
            // For ever, or as good as.
            Some(Err(_)) | None => None,
        };
        loop {
            let before = self.moved.load(Ordering::Relaxed);
            let mut fds = [
                PollFd::from_borrowed_fd(fd, flags),
                PollFd::new(&self.stop.0, PollFlags::IN),
                // Once more the same, if there is nobody else.
                PollFd::from_borrowed_fd(process.unwrap_or(self.stop.0.as_fd()), PollFlags::IN),
            ];
            let ready = match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => continue,
                ready => ready.map_err(|error| Failure::Pipe(error.into()))?,
            };
            if !fds[1].revents().is_empty() {
                return Err(Failure::Stopped);
            }
            if !fds[2].revents().is_empty() {
                return Err(Failure::Unread);
            }
            if ready > 0 {
                return Ok(());
            }
            if self.moved.load(Ordering::Relaxed) == before {
                return Err(Failure::Stalled {
                    seconds: patience.unwrap_or_default().as_secs(),
                });
            }
        }
    }
}
