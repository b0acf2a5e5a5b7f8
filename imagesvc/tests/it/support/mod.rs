//! Images, servers and directories for the tests.

pub(crate) mod http;
pub(crate) mod image;
pub(crate) mod registry;

use std::{
    os::fd::AsFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use imagesvc::{ImageService, ImageServiceConfig, RegistryConfig};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use tokio::task::spawn_blocking;

/// How long what happens in the background may take.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn open(root: &Path) -> ImageService {
    open_with(ImageServiceConfig::default(), root).await
}

pub(crate) async fn open_with(config: ImageServiceConfig, root: &Path) -> ImageService {
    ImageService::open(config, root, Arc::new(()))
        .await
        .unwrap()
}

pub(crate) fn with_registry(name: &str, registry: RegistryConfig) -> ImageServiceConfig {
    ImageServiceConfig {
        registries: [(name.to_owned(), registry)].into(),
        ..ImageServiceConfig::default()
    }
}

/// Every file below `root`, as relative paths, but the lock.
pub(crate) fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if !path.ends_with("lock") {
                let relative = path.strip_prefix(root).unwrap();
                found.push(relative.to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Waits for what happens in the background and shows in the files of `dir`:
/// `condition` is asked again whenever one of them has changed.
pub(crate) async fn eventually(dir: &Path, what: &str, mut condition: impl FnMut() -> bool) {
    let changes = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
    let kinds = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVE;
    changes.add_watch(dir, kinds).unwrap();
    let changes = Arc::new(changes);
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        let left = deadline.saturating_duration_since(Instant::now());
        let changes = Arc::clone(&changes);
        let changed = spawn_blocking(move || {
            let mut event = [PollFd::new(changes.as_fd(), PollFlags::POLLIN)];
            let changed = poll(&mut event, PollTimeout::try_from(left).unwrap()).unwrap() > 0;
            if changed {
                changes.read_events().unwrap();
            }
            changed
        });
        assert!(changed.await.unwrap(), "not in time: {what}");
    }
}

/// A port on which nobody listens.
pub(crate) fn closed_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
