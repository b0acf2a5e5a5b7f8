//! ExecSync: a command in a running container, its output streamed.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use agent_api::{ExecExit, ExecSyncEvent, ExecSyncRequest, exec_sync_event::Event};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::launch::{self, LaunchError, Launched, PidNamespace};
use super::plan::{Entry, Plan, Stdio};
use super::stdio::{self, CHUNK, Source, StdioError};
use super::{Container, Containers, Error, Phase, next_exec, spec};
use crate::cgroup::Cgroup;
use crate::reaper::ExitCode;

/// Commands running at once in the whole guest: probes of every container and
/// some room.
pub const MAX_EXECS: usize = 64;

/// Chunks of output that wait for the host before the command's writes do.
const QUEUE: usize = 4;

/// How long the host may take no output of a command that has ended.
const HOST_STALL: Duration = Duration::from_secs(30);

pub type Output = mpsc::Receiver<ExecSyncEvent>;

/// A command that runs, with all that is needed to see it to its end.
struct Running {
    container: Arc<Container>,
    cgroup: Cgroup,
    process: Launched,
    exit: oneshot::Receiver<ExitCode>,
    ended: watch::Sender<bool>,
    pumps: Vec<JoinHandle<()>>,
    events: mpsc::Sender<ExecSyncEvent>,
    _permit: OwnedSemaphorePermit,
}

impl Containers {
    /// Starts the command; fails if it cannot be run. The command is killed
    /// when the receiver is dropped before its last event.
    pub async fn exec_sync(&self, request: ExecSyncRequest) -> Result<Output, Error> {
        let container = self.get(&request.container_id)?;
        let containers = self.clone();
        // Spawned so that a caller who gives up leaves nothing half made.
        tokio::spawn(async move { containers.run(container, request).await }).await?
    }

    async fn run(
        &self,
        container: Arc<Container>,
        request: ExecSyncRequest,
    ) -> Result<Output, Error> {
        let permit = self.inner.execs.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Error::TooManyExecs)?;
        {
            let state = container.state();
            if state.phase != Phase::Running || *container.ended.borrow() {
                let running = Phase::Running.name();
                let phase = if state.phase == Phase::Running {
                    Phase::Exited
                } else {
                    state.phase
                };
                let id = container.id.clone();
                return Err(Error::Phase {
                    id,
                    phase: phase.name(),
                    wanted: running,
                });
            }
        }
        let cgroup = container
            .cgroup
            .child(&format!("exec-{}", next_exec(&container)))?;
        let (events, output) = mpsc::channel(QUEUE);
        match self.begin(&container, &request, &cgroup, &events).await {
            Ok((process, exit, ended, pumps)) => {
                let running = Running {
                    container,
                    cgroup,
                    process,
                    exit,
                    ended,
                    pumps,
                    events,
                    _permit: permit,
                };
                let limit = request.timeout_millis;
                tokio::spawn(running.finish((limit > 0).then(|| Duration::from_millis(limit))));
                Ok(output)
            }
            Err(error) => {
                if let Err(undo) = cgroup.kill().await.and_then(|()| cgroup.remove()) {
                    eprintln!("drupe-agent: container {}: {undo}", container.id);
                }
                Err(error)
            }
        }
    }

    async fn begin(
        &self,
        container: &Container,
        request: &ExecSyncRequest,
        cgroup: &Cgroup,
        events: &mpsc::Sender<ExecSyncEvent>,
    ) -> Result<
        (
            Launched,
            oneshot::Receiver<ExitCode>,
            watch::Sender<bool>,
            Vec<JoinHandle<()>>,
        ),
        Error,
    > {
        let streams = stdio::streams(container.identity.uid, false, true)?;
        let (ours, theirs) = launch::channel()?;
        let cgroup_namespace = if container.namespaces.cgroup {
            libc::CLONE_NEWCGROUP
        } else {
            0
        };
        let target = container
            .process
            .pidfd
            .try_clone()
            .map_err(StdioError::Create)?;
        let plan = Plan {
            entry: Entry::Join {
                pidfd: target,
                namespaces: libc::CLONE_NEWNS | cgroup_namespace,
            },
            identity: container.identity.clone(),
            program: spec::program(&request.argv, container.envp.clone())?,
            stdio: Stdio::Files(streams.child),
            channel: theirs,
            wait: false,
        };
        let pause = self.pause();
        let pid = match (&pause, container.namespaces.pid) {
            (_, true) => PidNamespace::Join(container.process.pidfd.as_fd()),
            (Some(pause), false) => PidNamespace::Join(pause.pidfd()),
            (None, false) => PidNamespace::Guest,
        };
        let process = launch::launch(plan, ours, pid, false, cgroup.dir().as_fd())?;
        let exit = self.inner.reaper.watch(process.pid);

        let ended = watch::Sender::new(false);
        let mut pumps = Vec::new();
        for (stream, fd) in streams.outputs {
            let source = Source::new(fd, ended.subscribe()).map_err(StdioError::Create)?;
            let wrap = if stream == "stdout" {
                Event::Stdout
            } else {
                Event::Stderr
            };
            pumps.push(tokio::spawn(pump(source, wrap, events.clone())));
        }
        match process.executed().await {
            Ok(()) => Ok((process, exit, ended, pumps)),
            // The container has ended meanwhile and taken its namespaces along.
            Err(LaunchError::Vanished) if *container.ended.borrow() => Err(Error::Phase {
                id: container.id.clone(),
                phase: Phase::Exited.name(),
                wanted: Phase::Running.name(),
            }),
            Err(error) => Err(error.into()),
        }
    }
}

impl Running {
    async fn finish(mut self, limit: Option<Duration>) {
        let time_is_up = async {
            match limit {
                Some(limit) => sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        let mut timed_out = false;
        let mut code = tokio::select! {
            biased;
            code = &mut self.exit => Some(code),
            () = time_is_up => {
                timed_out = true;
                None
            }
            () = self.events.closed() => None,
        };
        if code.is_none() {
            // Everything the command has started goes with it.
            if let Err(error) = self.cgroup.kill().await {
                eprintln!("drupe-agent: container {}: {error}", self.container.id);
            }
            code = Some((&mut self.exit).await);
        }
        // The reaper never drops a sender before it has used it.
        let code = code.and_then(Result::ok).unwrap_or(ExitCode::KILLED);
        self.ended.send_replace(true);
        for pump in self.pumps {
            if let Err(error) = pump.await {
                eprintln!(
                    "drupe-agent: container {}: output: {error}",
                    self.container.id
                );
            }
        }
        let exit = Event::Exit(ExecExit {
            code: code.0,
            timed_out,
        });
        // A caller who has gone wants no exit either.
        let _ = self
            .events
            .send_timeout(ExecSyncEvent { event: Some(exit) }, HOST_STALL)
            .await;
        drop(self.process);
        // What the command left running in the background stays, in its
        // cgroup, until the container goes.
        if let Err(error) = self.cgroup.remove() {
            let busy = matches!(&error, crate::cgroup::CgroupError::Remove { source, .. }
                if source.raw_os_error() == Some(libc::EBUSY));
            if !busy {
                eprintln!("drupe-agent: container {}: {error}", self.container.id);
            }
        }
    }
}

/// Moves output to the host until its end, or until nobody takes it.
async fn pump(mut source: Source, wrap: fn(Vec<u8>) -> Event, events: mpsc::Sender<ExecSyncEvent>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = match source.read(&mut buffer).await {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) => {
                eprintln!("drupe-agent: cannot read the output of a command: {error}");
                return;
            }
        };
        let event = ExecSyncEvent {
            event: Some(wrap(buffer[..length].to_vec())),
        };
        let sent = if source.has_ended() {
            events.send_timeout(event, HOST_STALL).await.is_ok()
        } else {
            events.send(event).await.is_ok()
        };
        if !sent {
            return;
        }
    }
}
