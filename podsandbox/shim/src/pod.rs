//! The pod's containers and what they share. The gRPC server is the only
//! caller.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::{AttachRequest, ContainerState, Event};
use drupe_agent::container::attach;
use drupe_agent::container::session::{Events, Sessions};
use drupe_agent::reaper::{ExitCode, Reaper};
use drupe_vmm::logs::LogHandle;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::{Semaphore, broadcast, oneshot};
use tokio::time::timeout;

use crate::cgroup::{Group, Layout};
use crate::container::{Container, Phase};
use crate::error::Error;
use crate::exec::MAX_EXECS;
use crate::pause::Pause;
use crate::runtime::{Runtime, RuntimeError};

/// A pod has tens of containers.
pub const MAX_CONTAINERS: usize = 256;
/// Clients at once. Each may have half a MiB of output waiting for it.
pub const MAX_ATTACHED: usize = 64;
/// Events kept for a subscriber that is slow; one that falls further behind is
/// told to list the containers instead.
const EVENT_QUEUE: usize = 256;
/// How long the end of a pod waits for output to be written.
const EXIT_PUBLISHED: Duration = Duration::from_secs(2);
/// What a shell reports of a process that SIGKILL ended.
const KILLED: i32 = 137;

pub enum Slot {
    Creating,
    Ready(Arc<Container>),
}

pub struct Inner {
    slots: Mutex<BTreeMap<String, Slot>>,
    events: broadcast::Sender<Event>,
    pub cgroup: Group,
    /// The files of /etc that containers share. On disk: a container may write
    /// to them as much as it likes.
    pub etc: PathBuf,
    pub layout: Layout,
    pub host_network: bool,
    pub logs: LogHandle,
    pub reaper: Reaper,
    pub runtime: Runtime,
    /// The process that holds the pod's PID namespace, while there is one.
    pub pause: tokio::sync::Mutex<Option<Pause>>,
    pub execs: Arc<Semaphore>,
    attached: Arc<Semaphore>,
    pub sessions: Arc<Sessions>,
}

/// All containers of the pod. Cheap to clone.
#[derive(Clone)]
pub struct Containers {
    pub inner: Arc<Inner>,
}

pub struct Parts {
    pub dir: PathBuf,
    pub program: PathBuf,
    pub cgroup: PathBuf,
    pub etc: PathBuf,
    pub host_network: bool,
    pub logs: LogHandle,
    pub reaper: Reaper,
}

impl Containers {
    pub fn new(parts: Parts) -> Result<Self, Error> {
        let layout = Layout::of_this_host()?;
        let runtime_dir = parts.dir.join("runtime");
        match fs::create_dir(&runtime_dir) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::File {
                    action: "make",
                    path: runtime_dir,
                    source,
                });
            }
            _ => {}
        }
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        Ok(Self {
            inner: Arc::new(Inner {
                slots: Mutex::default(),
                events,
                cgroup: Group::new(layout, &parts.cgroup),
                layout,
                etc: parts.etc,
                host_network: parts.host_network,
                logs: parts.logs,
                runtime: Runtime::new(parts.program, runtime_dir, parts.reaper.clone()),
                reaper: parts.reaper,
                pause: Default::default(),
                execs: Arc::new(Semaphore::new(MAX_EXECS)),
                attached: Arc::new(Semaphore::new(MAX_ATTACHED)),
                sessions: Arc::default(),
            }),
        })
    }

    pub fn slots(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        // Every change of the map is one call.
        let slots = self.inner.slots.lock();
        slots.unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.slots().get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            Some(Slot::Creating) | None => Err(Error::Unknown { id: id.to_owned() }),
        }
    }

    pub fn all(&self) -> Vec<Arc<Container>> {
        let slots = self.slots();
        let ready = slots.values().filter_map(|slot| match slot {
            Slot::Ready(container) => Some(container.clone()),
            Slot::Creating => None,
        });
        ready.collect()
    }

    /// Starts under way are waited for, as long as they may take: nobody
    /// hears of a container that comes to run unasked.
    pub async fn list(&self) -> Vec<ContainerState> {
        let all = self.all();
        for container in &all {
            if container.state().phase == Phase::Starting {
                drop(container.starting.lock().await);
            }
        }
        all.iter().map(|container| container.to_api()).collect()
    }

    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.inner.events.subscribe()
    }

    /// Nobody listens: a daemon that comes back lists the containers.
    pub fn tell(&self, event: Event) {
        let _ = self.inner.events.send(event);
    }

    /// The PID namespace that the pod's containers share, made for the first
    /// that asks. When its holder ends, the kernel kills all that is in it; the
    /// next container that asks then gets another.
    pub async fn share_pid_namespace(&self) -> Result<OwnedFd, Error> {
        let mut slot = self.inner.pause.lock().await;
        let pause = match &mut *slot {
            Some(pause) => pause,
            empty => {
                let (pause, exit) = Pause::start(&self.inner.reaper).await?;
                tokio::spawn(self.clone().await_end_of_pause(pause.pid, exit));
                empty.insert(pause)
            }
        };
        pause.namespace.try_clone().map_err(Error::Pause)
    }

    async fn await_end_of_pause(self, pid: i32, exit: oneshot::Receiver<ExitCode>) {
        // The reaper never drops a sender before it has used it.
        let code = exit.await.unwrap_or(ExitCode::KILLED);
        let mut slot = self.inner.pause.lock().await;
        // At the pod's end it was taken out before.
        if slot.take_if(|pause| pause.pid == pid).is_some() {
            tracing::warn!(
                code = code.0,
                "the holder of the shared PID namespace ended, and all that was in it"
            );
        }
    }

    /// A process that has ended is past signals: that is no error.
    pub async fn signal(&self, id: &str, number: u32, all: bool) -> Result<(), Error> {
        let container = self.get(id)?;
        let known = i32::try_from(number).ok();
        let signal = known.and_then(|number| Signal::try_from(number).ok());
        let signal = signal.ok_or(Error::Signal { signal: number })?;
        let _starting = container.starting.lock().await;
        let (phase, pid) = {
            let state = container.state();
            (state.phase, state.pid)
        };
        if phase == Phase::Created && signal == Signal::SIGKILL {
            container.never_ran(self, Some(KILLED), String::new());
            return Ok(());
        }
        // Once reaped, its id may be another process's.
        if phase != Phase::Running || *container.ended.borrow() {
            return Ok(());
        }
        if all {
            return Ok(container.cgroup.signal_all(signal)?);
        }
        match kill(Pid::from_raw(pid), signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(source) => Err(Error::Send {
                id: id.to_owned(),
                signal: number,
                source,
            }),
        }
    }

    /// The session ends with the container, or with the client's standard
    /// input unless that is the container's only one (stdin_once).
    pub fn attach(&self, request: AttachRequest) -> Result<Events<Error>, Error> {
        let container = self.get(&request.container_id)?;
        container.check_running()?;
        let target = container.target();
        let target = target.ok_or_else(|| container.in_phase(Phase::Created, Phase::Running))?;
        let permit = self.inner.attached.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Error::TooManyAttached)?;
        let (client, events) = self.inner.sessions.begin()?;
        let asked = request.streams.unwrap_or_default();
        let too_slow = Error::TooSlow {
            id: container.id.clone(),
        };
        tokio::spawn(attach::serve(target, asked, client, too_slow, permit));
        Ok(events)
    }

    /// Ends every container and waits until its output is written; best
    /// effort, for the pod's own end.
    pub async fn kill_all(&self) {
        let all = self.all();
        for container in &all {
            // What does not run yet is not to be started any more.
            let killed = self
                .signal(&container.id, Signal::SIGKILL as u32, true)
                .await;
            if let Err(error) = killed.and(container.cgroup.kill().await.map_err(Error::from)) {
                tracing::warn!(container = container.id, %error, "cannot kill a container");
            }
        }
        let taken = async {
            for container in &all {
                // The container holds the sender.
                let _ = container.published.subscribe().wait_for(|done| *done).await;
            }
        };
        if timeout(EXIT_PUBLISHED, taken).await.is_err() {
            tracing::warn!("not all output of containers was written");
        }
    }
}

pub fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    fs::write(path, bytes).map_err(|source| Error::File {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

/// Whether the runtime knows no such container (any more): its wording is its
/// own, and what it keeps is in the pod's directory.
pub fn is_unknown(error: &RuntimeError) -> bool {
    matches!(error, RuntimeError::Refused { message } if message.contains("does not exist"))
}
