//! The pod's containers.
//!
//! ```text
//!            create              start                 exit, output taken
//! (nothing) ───────► Created ──► Starting ──► Running ──► Exited
//!                       │            └──── exec failed ────►│
//!                       └──────── killed while waiting ────►│
//! ```
//!
//! A container's process is made by `create`, waits for `start` just before
//! its `execve`, and is followed by one task ([`supervise`]) to its end: that
//! task kills what is left of the container, lets its output reach the host,
//! and only then publishes the exit. The gRPC server is the only caller.

pub mod attach;
mod capabilities;
pub mod child;
mod command;
mod create;
mod dev_tree;
mod device_files;
mod devices;
mod error;
pub mod exec;
mod go_between;
mod guest_devices;
mod instance;
mod launch;
mod mounts;
mod node_devices;
mod pause;
mod plan;
mod seccomp;
pub mod session;
mod spec;
mod start;
pub mod stdin;
pub mod stdio;
mod supervise;
pub mod tee;
pub mod user;
mod volumes;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use agent_api::{ContainerState, Event, OomKill, UpdateContainerRequest, event};
use oci_spec::runtime::LinuxResources;
use tokio::sync::{Notify, broadcast};
use tokio::time::timeout;

use attach::MAX_ATTACHED;
use command::MAX_EXECS;
pub use dev_tree::DevError;
pub use devices::DeviceError;
pub use error::Error;
pub use instance::{Container, Outputs};
pub use launch::LaunchError;
pub use mounts::{ETC_DIR, ETC_FILES, MountError, SHM};
pub use node_devices::NodeDeviceError;
pub use spec::{SpecError, sysctl_path};

use crate::oom::OomWatch;
use crate::reaper::Reaper;
use crate::sys;
use crate::userns::UserNamespace;
use devices::Guard;
use pause::Pause;
use plan::SeccompFilter;
use session::Sessions;
use volumes::Volumes;

/// A pod has tens of containers.
const MAX_CONTAINERS: usize = 256;

/// The kernel's bounds.
const OOM_SCORE_MIN: i32 = -1000;
const OOM_SCORE_MAX: i32 = 1000;

/// Events kept for a subscriber that is slow; one that falls further behind is
/// told to list the containers instead.
const EVENT_QUEUE: usize = 256;

/// How long a removal waits for the exit of a container that it has killed to
/// be published, which waits for the host to take its output.
const EXIT_PUBLISHED: Duration = Duration::from_secs(2);

enum Slot {
    Creating,
    Ready(Arc<Container>),
}

struct Inner {
    slots: Mutex<BTreeMap<String, Slot>>,
    events: broadcast::Sender<Event>,
    reaper: Reaper,
    oom: OomWatch,
    /// The user namespace of the pod's containers, if it is not the guest's.
    user: OnceLock<Arc<UserNamespace>>,
    /// The process that holds the pod's PID namespace, once there is one.
    pause: Mutex<Option<Arc<Pause>>>,
    /// The last seccomp profile compiled: a pod's containers share it.
    seccomp: Mutex<Option<(oci_spec::runtime::LinuxSeccomp, Arc<SeccompFilter>)>>,
    /// The last guard of devices loaded, likewise.
    guard: Mutex<Option<Arc<Guard>>>,
    volumes: Arc<Volumes>,
    execs: Arc<tokio::sync::Semaphore>,
    attached: Arc<tokio::sync::Semaphore>,
    sessions: Arc<Sessions>,
    /// Told when a container is created, or is not to be.
    settled: Notify,
}

/// All containers of the pod. Cheap to clone.
#[derive(Clone)]
pub struct Containers {
    inner: Arc<Inner>,
}

impl Containers {
    pub fn new(reaper: Reaper) -> std::io::Result<Self> {
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        let publisher = events.clone();
        let oom = OomWatch::start(Box::new(move |id| {
            // Nobody listens: a daemon that comes back lists the containers.
            let _ = publisher.send(Event {
                container_id: id.to_owned(),
                event: Some(event::Event::OomKill(OomKill {})),
            });
        }))?;
        Ok(Self {
            inner: Arc::new(Inner {
                slots: Mutex::default(),
                events,
                reaper,
                oom,
                user: OnceLock::new(),
                pause: Mutex::default(),
                seccomp: Mutex::default(),
                guard: Mutex::default(),
                volumes: Arc::default(),
                execs: Arc::new(tokio::sync::Semaphore::new(MAX_EXECS)),
                attached: Arc::new(tokio::sync::Semaphore::new(MAX_ATTACHED)),
                sessions: Arc::default(),
                settled: Notify::new(),
            }),
        })
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        // Every change of the map is one call.
        self.inner
            .slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.slots().get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            Some(Slot::Creating) | None => Err(Error::Unknown { id: id.to_owned() }),
        }
    }

    /// The container, once its creation is over. Who asked for that may have
    /// gone: a daemon that was killed, and its successor removes what came of
    /// it.
    async fn settled(&self, id: &str) -> Result<Option<Arc<Container>>, Error> {
        let settled = async {
            loop {
                let mut change = std::pin::pin!(self.inner.settled.notified());
                // From here on none is missed.
                change.as_mut().enable();
                match self.slots().get(id) {
                    Some(Slot::Ready(container)) => return Some(container.clone()),
                    Some(Slot::Creating) => {}
                    None => return None,
                }
                change.await;
            }
        };
        let settled = timeout(create::SETUP_TIMEOUT, settled).await;
        settled.map_err(|_| Error::Phase {
            id: id.to_owned(),
            phase: "being created",
            wanted: "created",
        })
    }

    pub fn all(&self) -> Vec<Arc<Container>> {
        self.slots()
            .values()
            .filter_map(|slot| match slot {
                Slot::Ready(container) => Some(container.clone()),
                Slot::Creating => None,
            })
            .collect()
    }

    pub fn list(&self) -> Vec<ContainerState> {
        self.all()
            .iter()
            .map(|container| container.to_api())
            .collect()
    }

    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.inner.events.subscribe()
    }

    /// Where streams from the host find their sessions.
    pub fn sessions(&self) -> Arc<Sessions> {
        self.inner.sessions.clone()
    }

    pub fn resize(&self, token: &[u8], width: u32, height: u32) -> Result<(), Error> {
        Ok(self.inner.sessions.resize(token, width, height)?)
    }

    /// The PID namespace that the pod's containers share, made for the first
    /// that asks.
    pub fn share_pid_namespace(&self) -> Result<Arc<Pause>, Error> {
        let mut pause = self
            .inner
            .pause
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*pause {
            Some(pause) => Ok(pause.clone()),
            None => {
                let started = Pause::start(self.user().map(Arc::as_ref))?;
                Ok(pause.insert(Arc::new(started)).clone())
            }
        }
    }

    /// All containers from now on are in `user`; the first call holds.
    pub fn use_user_namespace(&self, user: UserNamespace) {
        self.inner.user.get_or_init(|| Arc::new(user));
    }

    pub fn has_user_namespace(&self) -> bool {
        self.user().is_some()
    }

    fn user(&self) -> Option<&Arc<UserNamespace>> {
        self.inner.user.get()
    }

    /// The user namespace of a container, with `guest` of a place in the guest
    /// itself.
    fn user_for(&self, guest: bool) -> Option<&Arc<UserNamespace>> {
        self.user().filter(|_| !guest)
    }

    /// A process that has ended is past signals: that is no error.
    pub fn signal(&self, id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let container = self.get(id)?;
        let number = i32::try_from(signal)
            .ok()
            .filter(|number| (1..=libc::SIGRTMAX()).contains(number))
            .ok_or(Error::Signal { signal })?;
        if *container.ended.borrow() {
            return Ok(());
        }
        if all {
            if number == libc::SIGKILL {
                container.cgroup.send_kill()?;
            } else {
                container.cgroup.signal_all(number)?;
            }
            return Ok(());
        }
        match sys::pidfd_send_signal(container.process.pidfd.as_fd(), number) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(errno) => Err(Error::Send {
                id: id.to_owned(),
                signal,
                source: errno.into(),
            }),
        }
    }

    #[expect(clippy::disallowed_methods, reason = "the bounds are constants")]
    pub async fn update(&self, request: UpdateContainerRequest) -> Result<(), Error> {
        let container = self.get(&request.id)?;
        let resources: LinuxResources =
            serde_json::from_slice(&request.resources).map_err(Error::Resources)?;
        let score = request
            .oom_score_adj
            .map(|score| score.clamp(OOM_SCORE_MIN, OOM_SCORE_MAX));
        // Dropping caches may wait for the disk.
        let work = tokio::task::spawn_blocking(move || {
            container.cgroup.update(&resources)?;
            if let Some(score) = score {
                // Before the processes: one that is made meanwhile has it too.
                *container.oom_score() = Some(score);
                container.cgroup.set_oom_score(score)?;
            }
            Ok(())
        });
        work.await?
    }

    /// Kills what is left of a container and gives back all it had.
    pub async fn remove(&self, id: &str) -> Result<(), Error> {
        let Some(container) = self.settled(id).await? else {
            return Ok(());
        };
        let mut rootfs = container.rootfs.lock().await;
        // Another call has removed it while this one waited.
        let is_there = |slot: &Slot| matches!(slot, Slot::Ready(c) if Arc::ptr_eq(c, &container));
        if !self.slots().get(id).is_some_and(is_there) {
            return Ok(());
        }
        container.cgroup.kill().await?;
        let mut published = container.published.subscribe();
        if timeout(EXIT_PUBLISHED, published.wait_for(|done| *done))
            .await
            .is_err()
        {
            let supervisor = container.supervisor.lock();
            if let Some(task) = supervisor.unwrap_or_else(PoisonError::into_inner).take() {
                task.abort();
            }
            // Who waits for its end waits for nothing more.
            container.published.send_replace(true);
        }
        // What it mounted of its own files for others to see holds its root.
        let volumes = container.volumes.lock();
        drop(volumes.unwrap_or_else(PoisonError::into_inner).take());
        rootfs.remove().await?;
        container.cgroup.remove()?;
        self.slots().remove(id);
        Ok(())
    }

    /// Ends every container and waits until the host has taken its output;
    /// best effort, for the guest's own end.
    pub async fn kill_all(&self) {
        let all = self.all();
        for container in &all {
            if let Err(error) = container.cgroup.kill().await {
                eprintln!("drupe-agent: container {}: {error}", container.id);
            }
        }
        let taken = async {
            for container in &all {
                // The container holds the sender.
                let _ = container.published.subscribe().wait_for(|done| *done).await;
            }
        };
        if timeout(EXIT_PUBLISHED, taken).await.is_err() {
            eprintln!("drupe-agent: the host has not taken all output");
        }
    }
}

/// Ids become names of directories and words on the log port.
fn check_id(id: &str) -> Result<(), Error> {
    const MAX_ID: usize = 128;
    let fine = (1..=MAX_ID).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && id.as_bytes()[0].is_ascii_alphanumeric();
    if fine {
        Ok(())
    } else {
        Err(Error::Id { id: id.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_one_directory() {
        for good in ["a", "3f2a", "web-1.x_y"] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-x",
            "a b",
            "a\n",
            "ü",
            &"x".repeat(129),
        ] {
            assert!(matches!(check_id(bad), Err(Error::Id { .. })), "{bad}");
        }
    }
}
