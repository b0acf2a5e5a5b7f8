//! A file server on a thread of this process, for tests and fuzz targets of the
//! device.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use vmm_client::IdRange;

use super::{FileServer, channel};

/// Starts it on `root`; the monitor's end of its channel. `prepare` runs on the
/// thread first. It ends when that end is closed.
pub fn start(
    root: &Path,
    ids: Option<IdRange>,
    prepare: impl FnOnce() + Send + 'static,
) -> io::Result<OwnedFd> {
    let (ours, theirs) = channel::pair()?;
    let (tell, told) = mpsc::channel();
    let root = root.to_owned();
    thread::spawn(move || {
        // The umask and the working directory become its own.
        let server = unshare(CloneFlags::CLONE_FS)
            .map_err(io::Error::from)
            .and_then(|()| {
                prepare();
                FileServer::new(&root, None, ids).map_err(io::Error::other)
            });
        let (server, outcome) = match server {
            Ok(server) => (Some(server), Ok(())),
            Err(error) => (None, Err(error)),
        };
        // Whoever asked waits for it.
        let _ = tell.send(outcome);
        if let Some(server) = server
            && let Err(error) = server.serve(&theirs)
        {
            panic!("the file server failed: {error:?}");
        }
    });
    told.recv().map_err(io::Error::other)??;
    Ok(ours)
}
