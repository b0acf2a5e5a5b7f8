//! Waiting for what others do with files.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::unistd::read;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A file that is written to, or a directory in which files are made.
pub struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    pub fn new(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(path, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE)?;
        // SAFETY: an `OwnedFd` is open, and neither closed nor replaced while
        // the `AsyncFd` owns it.
        let fd = unsafe { AsyncFd::register_with_interest(inotify.into(), Interest::READABLE) }?;
        Ok(Self(fd))
    }

    /// Returns once something has happened since this was made, or since it
    /// returned last.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let events = ready.try_io(|fd| Ok(read(fd.get_ref(), &mut [0; 4096])?));
            // Otherwise somebody else was quicker to read.
            if let Ok(events) = events {
                return events.map(drop);
            }
        }
    }
}
