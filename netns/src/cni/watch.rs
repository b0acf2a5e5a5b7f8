//! Follows the configuration and plugin directories: is there a network?
//!
//! inotify says when to look again. A directory that does not exist is waited
//! for through its ancestors. Each look starts with fresh watches and only
//! then reads, so no change falls between.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    task::{AbortHandle, spawn_blocking},
    time::timeout,
};

use super::config::{NetworkList, load_network};

/// How often to look although nothing was reported: mounts over a directory
/// and targets of symbolic links raise no event.
const RECHECK: Duration = Duration::from_secs(60);
/// The same where the node is out of inotify instances.
const RECHECK_BLIND: Duration = Duration::from_secs(5);

/// Whether pods can be attached to a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkState {
    Ready(Arc<NetworkList>),
    /// One sentence that names the directory or file and the cause.
    NotReady(String),
}

/// Watches until it is dropped.
#[derive(Debug)]
pub struct CniWatcher {
    state: watch::Receiver<NetworkState>,
    task: AbortHandle,
}

impl CniWatcher {
    /// Starts to watch; the first look is done when this returns.
    pub async fn start(conf_dir: PathBuf, bin_dirs: Vec<PathBuf>) -> io::Result<Self> {
        let places = Arc::new(Places {
            conf_dir: std::path::absolute(conf_dir)?,
            bin_dirs: bin_dirs
                .into_iter()
                .map(std::path::absolute)
                .collect::<Result<_, _>>()?,
        });
        let (mut watches, first) = places.look().await?;
        log_change(&first);
        let (sender, state) = watch::channel(first);
        let task = tokio::spawn(async move {
            loop {
                watches.changed().await;
                match places.look().await {
                    Ok((fresh, next)) => {
                        watches = fresh;
                        sender.send_if_modified(|state| {
                            let changed = *state != next;
                            if changed {
                                log_change(&next);
                                *state = next;
                            }
                            changed
                        });
                    }
                    Err(error) => {
                        tracing::error!(%error, "cannot look for CNI configurations");
                        watches = Watches::default();
                    }
                }
            }
        })
        .abort_handle();
        Ok(Self { state, task })
    }

    /// The state now and its changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<NetworkState> {
        self.state.clone()
    }

    #[must_use]
    pub fn current(&self) -> NetworkState {
        self.state.borrow().clone()
    }
}

impl Drop for CniWatcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn log_change(state: &NetworkState) {
    match state {
        NetworkState::Ready(network) => tracing::info!(
            network = network.name,
            source = %network.source.display(),
            "pod network ready"
        ),
        NetworkState::NotReady(reason) => tracing::warn!(reason, "pod network not ready"),
    }
}

struct Places {
    conf_dir: PathBuf,
    bin_dirs: Vec<PathBuf>,
}

impl Places {
    async fn look(self: &Arc<Self>) -> io::Result<(Watches, NetworkState)> {
        let places = Arc::clone(self);
        let (watches, state) = spawn_blocking(move || {
            let mut watches = InotifyWatches::new();
            if let Ok(watches) = &mut watches {
                watches.add_tree(&places.conf_dir);
                for dir in &places.bin_dirs {
                    watches.add_tree(dir);
                }
            }
            let state = match load_network(&places.conf_dir, &places.bin_dirs) {
                Ok(network) => NetworkState::Ready(Arc::new(network)),
                Err(reason) => NetworkState::NotReady(reason.to_string()),
            };
            (watches, state)
        })
        .await
        .map_err(io::Error::other)?;
        let watches = watches.and_then(|watches| {
            // SAFETY: `InotifyWatches` owns an open inotify descriptor, which
            // it neither closes nor replaces while `AsyncFd` owns it.
            let fd = unsafe { AsyncFd::register_with_interest(watches, Interest::READABLE) }?;
            Ok(Watches(Some(fd)))
        });
        let watches = watches.unwrap_or_else(|error| {
            tracing::warn!(%error, "no inotify: CNI configurations are looked for every 5 s");
            Watches::default()
        });
        Ok((watches, state))
    }
}

/// The watches of one look; none where inotify is not to be had.
#[derive(Default)]
struct Watches(Option<AsyncFd<InotifyWatches>>);

impl Watches {
    /// Returns when it is time to look again.
    async fn changed(&self) {
        let Some(inotify) = &self.0 else {
            tokio::time::sleep(RECHECK_BLIND).await;
            return;
        };
        let event = async {
            loop {
                let Ok(mut ready) = inotify.readable().await else {
                    return;
                };
                match inotify.get_ref().read() {
                    Ok(true) => return,
                    Ok(false) => {}
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    Err(errno) => {
                        tracing::warn!(%errno, "cannot read inotify events");
                        return;
                    }
                }
            }
        };
        // Late is no different from an event: look again.
        let _ = timeout(RECHECK, event).await;
    }
}

/// inotify and what counts on each watched directory.
struct InotifyWatches {
    inotify: Inotify,
    interests: HashMap<WatchDescriptor, Counts>,
}

#[derive(Default)]
struct Counts {
    /// Every event: the directory is one of those that are read.
    all: bool,
    /// Events of these entries: the next steps of paths.
    names: HashSet<OsString>,
}

impl AsRawFd for InotifyWatches {
    fn as_raw_fd(&self) -> RawFd {
        self.inotify.as_fd().as_raw_fd()
    }
}

impl InotifyWatches {
    fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        Ok(Self {
            inotify,
            interests: HashMap::new(),
        })
    }

    /// Watches `dir` and, for its coming and going, each of its ancestors.
    fn add_tree(&mut self, dir: &Path) {
        let mut child = None;
        for ancestor in dir.ancestors() {
            self.add(ancestor, child);
            child = ancestor.file_name();
        }
    }

    fn add(&mut self, dir: &Path, name: Option<&std::ffi::OsStr>) {
        let mask = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        match self.inotify.add_watch(dir, mask) {
            Ok(watch) => {
                let counts = self.interests.entry(watch).or_default();
                match name {
                    Some(name) => {
                        counts.names.insert(name.to_owned());
                    }
                    None => counts.all = true,
                }
            }
            // Its nearest existing ancestor tells when that changes.
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(errno) => tracing::warn!(dir = %dir.display(), %errno, "cannot watch"),
        }
    }

    /// Takes a batch of events; true if any of them counts.
    fn read(&self) -> Result<bool, Errno> {
        let events = self.inotify.read_events()?;
        Ok(events.iter().any(|event| {
            // No watch: the kernel's queue has overflowed.
            let Some(counts) = self.interests.get(&event.wd) else {
                return true;
            };
            match &event.name {
                Some(name) => counts.all || counts.names.contains(name),
                // About the directory itself: its permissions change nothing
                // for a path that leads through it, its end does.
                None => counts.all || !event.mask.contains(AddWatchFlags::IN_ATTRIB),
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "NAME", "plugins": [{"type": "p"}]}"#;

    async fn until(
        states: &mut watch::Receiver<NetworkState>,
        wanted: impl Fn(&NetworkState) -> bool,
    ) -> NetworkState {
        timeout(Duration::from_secs(4), states.wait_for(wanted))
            .await
            .expect("the state that was waited for")
            .unwrap()
            .clone()
    }

    fn named(name: &str) -> impl Fn(&NetworkState) -> bool {
        move |state| matches!(state, NetworkState::Ready(network) if network.name == name)
    }

    fn because(words: &str) -> impl Fn(&NetworkState) -> bool {
        move |state| matches!(state, NetworkState::NotReady(reason) if reason.contains(words))
    }

    #[tokio::test]
    async fn the_state_follows_the_directories_from_nothing_and_back() {
        let root = tempfile::tempdir().unwrap();
        let conf = root.path().join("etc/cni/net.d");
        let bins = root.path().join("opt/bin");
        let watcher = CniWatcher::start(conf.clone(), vec![bins.clone()])
            .await
            .unwrap();
        let mut states = watcher.subscribe();
        assert!(because("no CNI configuration")(&watcher.current()));

        fs::create_dir_all(&conf).unwrap();
        fs::write(conf.join("10-a.conflist"), LIST.replace("NAME", "a")).unwrap();
        until(&mut states, because("CNI plugin p of")).await;

        fs::create_dir_all(&bins).unwrap();
        fs::write(bins.join("p"), "").unwrap();
        fs::set_permissions(bins.join("p"), fs::Permissions::from_mode(0o755)).unwrap();
        until(&mut states, named("a")).await;

        fs::write(conf.join("05-b.conflist"), LIST.replace("NAME", "b")).unwrap();
        until(&mut states, named("b")).await;
        fs::rename(conf.join("05-b.conflist"), conf.join("x")).unwrap();
        until(&mut states, named("a")).await;
        fs::write(conf.join("10-a.conflist"), "{").unwrap();
        until(&mut states, because("10-a.conflist: it is not JSON")).await;

        // An ancestor is moved away and comes back whole.
        fs::write(conf.join("10-a.conflist"), LIST.replace("NAME", "c")).unwrap();
        until(&mut states, named("c")).await;
        let (etc, away) = (root.path().join("etc"), root.path().join("away"));
        fs::rename(&etc, &away).unwrap();
        until(&mut states, because("no CNI configuration")).await;
        fs::rename(&away, &etc).unwrap();
        until(&mut states, named("c")).await;
        fs::remove_dir_all(&etc).unwrap();
        until(&mut states, because("no CNI configuration")).await;
    }

    #[tokio::test]
    async fn a_look_that_finds_the_same_is_not_news() {
        let root = tempfile::tempdir().unwrap();
        let watcher = CniWatcher::start(root.path().join("net.d"), Vec::new())
            .await
            .unwrap();
        let mut states = watcher.subscribe();
        states.mark_unchanged();
        fs::create_dir(root.path().join("net.d")).unwrap();
        fs::write(root.path().join("net.d/x.conf"), "{").unwrap();
        until(&mut states, because("x.conf")).await;
        fs::write(root.path().join("net.d/readme"), "{").unwrap();
        fs::write(root.path().join("net.d/y.conf"), "[]").unwrap();
        until(&mut states, because("y.conf")).await;
        assert!(!states.has_changed().unwrap());
    }
}
