//! Images, servers and directories for the tests.

pub(crate) mod http;
pub(crate) mod image;
pub(crate) mod registry;

use std::{
    collections::BTreeMap,
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use imagesvc::{ImageService, ImageServiceConfig, RegistryConfig, Unpacker};
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
    ImageService::open(config, root, unpacker(), Arc::new(()))
        .await
        .unwrap()
}

/// `drupe-unpacker` as it was built: `DRUPE_TEST_UNPACKER`, or beside these
/// tests.
pub(crate) fn unpacker() -> Unpacker {
    let built = || {
        let deps = std::env::current_exe().unwrap();
        deps.ancestors().nth(2).unwrap().join("drupe-unpacker")
    };
    let program = std::env::var_os("DRUPE_TEST_UNPACKER").map_or_else(built, PathBuf::from);
    assert!(
        program.exists(),
        "{} is missing: run `make build`",
        program.display()
    );
    // Nobody's.
    let id = 1_879_113_728;
    Unpacker {
        program,
        uid: id,
        gid: id,
        strict: false,
    }
}

pub(crate) fn with_registry(name: &str, registry: RegistryConfig) -> ImageServiceConfig {
    ImageServiceConfig {
        registries: [(name.to_owned(), registry)].into(),
        ..ImageServiceConfig::default()
    }
}

/// The processes at a layer, by task.
pub(crate) fn unpackers(layer: &str) -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let id = path.file_name().unwrap().to_str().unwrap().parse();
        let (Ok(id), Ok(line)) = (id, fs::read(path.join("cmdline"))) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).into_owned();
        if let [_, task, name, ""] = line.split('\0').collect::<Vec<_>>()[..]
            && name == layer
        {
            found.insert(task.to_owned(), id);
        }
    }
    found
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
