//! The socket on which an OCI runtime hands over a terminal's master.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::net::UnixListener;
use tokio::time::{Instant, timeout_at};

use crate::error::Error;
use crate::packet;

/// The runtime has sent it before it ends, and is asked for it afterwards.
const WITHIN: Duration = Duration::from_secs(2);
/// The terminal's name comes beside it.
const MAX_NAME: usize = 4096;

pub struct Console {
    pub path: PathBuf,
    listener: UnixListener,
}

impl Console {
    pub fn listen(path: PathBuf) -> Result<Self, Error> {
        let listener = UnixListener::bind(&path).map_err(Error::Console)?;
        Ok(Self { path, listener })
    }

    /// The master, which does not block.
    pub async fn master(&self, until: Instant) -> Result<OwnedFd, Error> {
        let until = until.min(Instant::now() + WITHIN);
        let received = timeout_at(until, self.receive()).await;
        received
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(Error::Console)
    }

    async fn receive(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept().await?;
        let mut name = [0; MAX_NAME];
        let receive = || packet::receive(&stream, &mut name);
        let (_, fds) = stream.async_io(Interest::READABLE, receive).await?;
        let [master] = <[OwnedFd; 1]>::try_from(fds)
            .map_err(|_| io::Error::other("not one descriptor came"))?;
        fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(master)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = ?self.path, %error, "cannot remove a console socket");
        }
    }
}
