//! Watches `memory.events` of every container for kills by the kernel's OOM
//! killer.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Called with the container's id after its `memory.events` changed.
pub type Changed = Box<dyn Fn(&str) + Send + Sync>;

/// Cheap to clone.
#[derive(Clone)]
pub struct OomWatch {
    inner: Arc<Inner>,
}

struct Inner {
    inotify: Inotify,
    /// The same inotify instance, registered with the runtime.
    readiness: AsyncFd<OwnedFd>,
    watched: Mutex<HashMap<WatchDescriptor, String>>,
}

impl OomWatch {
    /// Starts to watch, for as long as the runtime lives.
    pub fn start(changed: Changed) -> std::io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let fd = inotify.as_fd().try_clone_to_owned()?;
        let readiness = sys::async_fd(fd, Interest::READABLE)?;
        let inner = Arc::new(Inner {
            inotify,
            readiness,
            watched: Mutex::default(),
        });
        let watch = Self { inner };
        tokio::spawn(watch.clone().run(changed));
        Ok(watch)
    }

    /// Watches container `id` until its cgroup is removed. A kernel without
    /// the memory controller has no such file, and no OOM kills to tell of.
    pub fn add(&self, id: &str, cgroup: &Path) -> std::io::Result<()> {
        let path = cgroup.join("memory.events");
        let mut watched = self
            .inner
            .watched
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match self
            .inner
            .inotify
            .add_watch(&path, AddWatchFlags::IN_MODIFY)
        {
            Ok(descriptor) => {
                watched.insert(descriptor, id.to_owned());
                Ok(())
            }
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    async fn run(self, changed: Changed) {
        loop {
            let mut ready = match self.inner.readiness.readable().await {
                Ok(ready) => ready,
                Err(error) => {
                    eprintln!("drupe-agent: cannot watch for OOM kills: {error}");
                    return;
                }
            };
            let events = match self.inner.inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    continue;
                }
                Err(errno) => {
                    eprintln!("drupe-agent: cannot read of OOM kills: {errno}");
                    return;
                }
            };
            for event in events {
                let mut watched = self
                    .inner
                    .watched
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    watched.remove(&event.wd);
                } else if let Some(id) = watched.get(&event.wd).cloned() {
                    drop(watched);
                    changed(&id);
                }
            }
        }
    }
}
