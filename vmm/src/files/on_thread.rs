//! A file server on a thread of this process, for tests and fuzz targets of the
//! device.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use nix::sched::{CloneFlags, unshare};
use vmm_client::IdRange;

use super::{FEWEST_FILES, FileServer, channel};

/// Starts it on `root`; the monitor's end of its channel. `prepare` runs on the
/// thread first. It ends when that end is closed.
pub fn start(
    root: &Path,
    ids: Option<IdRange>,
    prepare: impl FnOnce() + Send + 'static,
) -> io::Result<OwnedFd> {
    Ok(start_joinable(root, ids, prepare)?.0)
}

/// As [`start`], with the thread, which panics where the file server failed.
pub fn start_joinable(
    root: &Path,
    ids: Option<IdRange>,
    prepare: impl FnOnce() + Send + 'static,
) -> io::Result<(OwnedFd, JoinHandle<()>)> {
    let (ours, theirs) = channel::pair()?;
    let (tell, told) = mpsc::channel();
    let root = root.to_owned();
    let thread = thread::spawn(move || {
        // The umask and the working directory become its own.
        let server = unshare(CloneFlags::CLONE_FS)
            .map_err(io::Error::from)
            .and_then(|()| {
                prepare();
                FileServer::new(&root, None, ids, FEWEST_FILES).map_err(io::Error::other)
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
    Ok((ours, thread))
}
