//! The agent's end of a process's standard input.

use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, Interest};
use tokio::sync::Mutex;

use super::stdio::CHUNK;
use crate::sys;

/// A pipe's write end or a terminal's master, until it is closed. Clients that
/// write at once take turns chunk by chunk.
#[derive(Debug)]
pub struct Stdin {
    fd: Mutex<Option<AsyncFd<OwnedFd>>>,
    /// Closed once its first client has gone. A terminal never is.
    pub once: bool,
}

/// Which side ended a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndedBy {
    Client,
    Process,
}

impl Stdin {
    pub fn new(fd: OwnedFd, once: bool) -> io::Result<Self> {
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let fd = sys::async_fd(fd, Interest::WRITABLE)?;
        Ok(Self {
            fd: Mutex::new(Some(fd)),
            once,
        })
    }

    /// Waits for the process to take them.
    pub async fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        let fd = self.fd.lock().await;
        let fd = fd.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let mut rest = bytes;
        while !rest.is_empty() {
            let mut ready = fd.writable().await?;
            match nix::unistd::write(fd.get_ref(), rest) {
                Ok(written) => rest = &rest[written..],
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The process reads its end.
    pub async fn close(&self) {
        *self.fd.lock().await = None;
    }

    /// Moves a client's bytes until either side has ended.
    pub async fn feed(&self, mut client: impl AsyncRead + Unpin) -> EndedBy {
        let mut buffer = vec![0; CHUNK];
        loop {
            let length = match client.read(&mut buffer).await {
                // A connection that breaks is an end as well.
                Ok(0) | Err(_) => return EndedBy::Client,
                Ok(length) => length,
            };
            // It has closed its standard input, or ended.
            if self.write_all(&buffer[..length]).await.is_err() {
                return EndedBy::Process;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use nix::unistd::{pipe2, read};

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_process_that_does_not_read_holds_its_client_up() {
        let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let stdin = Arc::new(Stdin::new(ours, true).unwrap());
        let writer = {
            let stdin = stdin.clone();
            tokio::spawn(async move { stdin.write_all(&vec![b'x'; 1 << 20]).await })
        };
        tokio::task::yield_now().await;
        assert!(!writer.is_finished());
        let reader = tokio::task::spawn_blocking(move || {
            let (mut count, mut buffer) = (0, [0; 4096]);
            while let Ok(length @ 1..) = read(theirs.as_fd(), &mut buffer) {
                count += length;
            }
            count
        });
        writer.await.unwrap().unwrap();
        stdin.close().await;
        assert_eq!(reader.await.unwrap(), 1 << 20);
        let closed = stdin.write_all(b"x").await.unwrap_err();
        assert_eq!(closed.kind(), io::ErrorKind::BrokenPipe);
    }
}
