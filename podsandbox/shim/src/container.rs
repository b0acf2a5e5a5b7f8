//! One container, from its creation to its end.
//!
//! ```text
//!            create              start                 exit, output taken
//! (nothing) ───────► Created ──► Starting ──► Running ──► Exited
//!                       │            └──── could not run ─►│
//!                       └──────── killed while waiting ───►│
//! ```
//! The runtime is not called before the start: a program that cannot be run
//! is then told by the start, as users know it. One task ([`supervise`])
//! follows the process to its end; it kills what is left of the container,
//! lets its output reach the log, and only then publishes the exit.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use agent_api::container_state::Phase as ApiPhase;
use agent_api::{ContainerState, Event, Exit, event};
use drupe_agent::clock;
use drupe_agent::container::Outputs;
use drupe_agent::container::attach::Target;
use drupe_agent::container::stdin::Stdin;
use drupe_agent::container::user::Resolved;
use drupe_agent::reaper::ExitCode;
use oci_spec::runtime::Process;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::cgroup::Group;
use crate::error::Error;
use crate::layer::Layer;
use crate::pod::Containers;

/// What containerd answers for a process that never ran.
const START_ERROR_CODE: i32 = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Created,
    Starting,
    Running,
    Exited,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Exited => "exited",
        }
    }
}

pub struct State {
    pub phase: Phase,
    pub pid: i32,
    pub started_at: i64,
    pub exit: Option<Exit>,
}

/// What clients are attached to, once it runs.
pub struct Terminals {
    pub stdin: Option<Arc<Stdin>>,
    /// The master of its terminal.
    pub terminal: Option<Arc<OwnedFd>>,
}

pub struct Container {
    pub id: String,
    /// With its root file system in it, and what the runtime reads and writes.
    pub bundle: PathBuf,
    pub process: Process,
    pub user: Resolved,
    pub cgroup: Group,
    pub stdin: bool,
    pub stdin_once: bool,
    pub log: bool,
    pub terminals: OnceLock<Terminals>,
    pub outputs: Outputs,
    /// True once the process has ended.
    pub ended: watch::Sender<bool>,
    /// True once its exit was published.
    pub published: watch::Sender<bool>,
    pub state: Mutex<State>,
    /// Held by a start until its outcome is in `state`; taken before `state`.
    pub starting: tokio::sync::Mutex<()>,
    /// Held by a removal; taken before everything else.
    pub removing: tokio::sync::Mutex<()>,
    pub supervisor: Mutex<Option<JoinHandle<()>>>,
    pub execs: AtomicU64,
    /// What an update has made of the process's.
    pub oom_score: Mutex<Option<i32>>,
    pub layer: Layer,
    /// The PID namespace that it joins, held for the path in its spec.
    pub _joined: Option<OwnedFd>,
    /// That of its process, once it runs.
    pub namespace: OnceLock<OwnedFd>,
}

impl Container {
    pub fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn oom_score(&self) -> MutexGuard<'_, Option<i32>> {
        // Every change is one assignment.
        let score = self.oom_score.lock();
        score.unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_terminal(&self) -> bool {
        self.process.terminal().unwrap_or(false)
    }

    pub fn check_running(&self) -> Result<(), Error> {
        let phase = match self.state().phase {
            Phase::Running if !*self.ended.borrow() => return Ok(()),
            Phase::Running => Phase::Exited,
            phase => phase,
        };
        Err(self.in_phase(phase, Phase::Running))
    }

    pub fn in_phase(&self, phase: Phase, wanted: Phase) -> Error {
        Error::Phase {
            id: self.id.clone(),
            phase: phase.name(),
            wanted: wanted.name(),
        }
    }

    pub fn to_api(&self) -> ContainerState {
        let state = self.state();
        let phase = match state.phase {
            // Whether it comes to run is not known: a listing waits for that.
            Phase::Created | Phase::Starting => ApiPhase::Created,
            Phase::Running => ApiPhase::Running,
            Phase::Exited => ApiPhase::Exited,
        };
        ContainerState {
            id: self.id.clone(),
            phase: phase.into(),
            pid: state.pid.unsigned_abs(),
            started_at_unix_nanos: state.started_at,
            exit: state.exit.clone(),
            uid: self.user.uid,
            gid: self.user.gid,
            supplemental_groups: self.user.groups.clone(),
        }
    }

    /// What a client is attached to; none before the start.
    pub fn target(self: &Arc<Self>) -> Option<Target> {
        let terminals = self.terminals.get()?;
        let container = self.clone();
        let code = move || container.state().exit.as_ref().map_or(0, |exit| exit.code);
        Some(Target {
            stdin: terminals.stdin.clone(),
            terminal: terminals.terminal.clone(),
            outputs: self.outputs.clone(),
            published: self.published.subscribe(),
            code: Box::new(code),
        })
    }

    /// It never ran, and never will.
    pub fn never_ran(&self, containers: &Containers, code: Option<i32>, why: String) {
        self.ended.send_replace(true);
        self.outputs.stdout.end();
        self.outputs.stderr.end();
        self.publish(
            containers,
            Exit {
                code: code.unwrap_or(START_ERROR_CODE),
                oom_killed: false,
                finished_at_unix_nanos: clock::now_nanos(),
                start_error: agent_api::brief(why),
            },
        );
    }

    fn publish(&self, containers: &Containers, exit: Exit) {
        {
            let mut state = self.state();
            state.phase = Phase::Exited;
            state.exit = Some(exit.clone());
        }
        self.published.send_replace(true);
        containers.tell(Event {
            container_id: self.id.clone(),
            event: Some(event::Event::Exit(exit)),
        });
    }
}

/// What a container's process leaves to be awaited.
pub struct Vigil {
    pub exit: oneshot::Receiver<ExitCode>,
    pub pumps: Vec<JoinHandle<()>>,
}

/// Follows the process of `container` to its end.
pub async fn supervise(containers: Containers, container: Arc<Container>, vigil: Vigil) {
    // The reaper never drops a sender before it has used it.
    let code = vigil.exit.await.unwrap_or(ExitCode::KILLED);
    let finished_at = clock::now_nanos();
    container.ended.send_replace(true);
    drop(container.starting.lock().await);
    // In a PID namespace that is not its own, other processes outlive it.
    if let Err(error) = container.cgroup.kill().await {
        tracing::warn!(container = container.id, %error, "processes are left");
    }
    for pump in vigil.pumps {
        if let Err(error) = pump.await {
            tracing::warn!(container = container.id, %error, "output may be missing");
        }
    }
    // A kernel without the memory controller kills nobody.
    let oom_killed = container.cgroup.oom_kills().is_ok_and(|kills| kills > 0);
    container.publish(
        &containers,
        Exit {
            code: code.0,
            oom_killed,
            finished_at_unix_nanos: finished_at,
            start_error: String::new(),
        },
    );
}
