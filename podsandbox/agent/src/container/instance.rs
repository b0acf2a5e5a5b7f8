//! One container: what it has, and where it stands.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::container_state::Phase as ApiPhase;
use agent_api::{ContainerState, Exit};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::error::Error;
use super::launch::Launched;
use super::plan::{Identity, StringArray};
use super::spec::OwnNamespaces;
use super::stdin::Stdin;
use super::tee::Tee;
use super::volumes::Held;
use crate::cgroup::Cgroup;
use crate::rootfs::Rootfs;
use crate::stats::FsUsage;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Created,
    Starting,
    Running,
    Exited,
}

impl Phase {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Exited => "exited",
        }
    }
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) phase: Phase,
    pub(super) started_at: i64,
    /// Why the program never ran, with the exit code that says so.
    pub(super) start_error: Option<(String, i32)>,
    pub(super) exit: Option<Exit>,
}

#[derive(Debug)]
pub struct Container {
    pub(super) id: String,
    /// A place in the guest itself: commands need no start of it.
    pub(super) guest: bool,
    pub(super) cgroup: Cgroup,
    pub(super) namespaces: OwnNamespaces,
    pub(super) identity: Identity,
    /// What an update has made of the identity's.
    pub(super) oom_score: Mutex<Option<i32>>,
    pub(super) envp: Arc<StringArray>,
    pub(super) process: Launched,
    /// Open for as long as the container may read it, attached or not.
    pub(super) stdin: Option<Arc<Stdin>>,
    /// The master of its terminal.
    pub(super) terminal: Option<Arc<OwnedFd>>,
    pub(super) outputs: Outputs,
    /// True once the process has ended.
    pub(super) ended: watch::Sender<bool>,
    /// True once its exit was published.
    pub(super) published: watch::Sender<bool>,
    pub(super) state: Mutex<State>,
    /// Held by a start until its outcome is in `state`; taken before `state`.
    pub(super) starting: tokio::sync::Mutex<()>,
    /// Held by a removal; taken before everything else.
    pub(super) rootfs: tokio::sync::Mutex<Rootfs>,
    pub(super) supervisor: Mutex<Option<JoinHandle<()>>>,
    pub(super) execs: AtomicU64,
    pub fs_usage: FsUsage,
    /// None once it is being removed.
    pub(super) volumes: Mutex<Option<Held>>,
}

/// Where clients get a container's output from. A terminal has only the first.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    pub stdout: Arc<Tee>,
    pub stderr: Arc<Tee>,
}

impl Container {
    pub(super) fn check_running(&self) -> Result<(), Error> {
        let phase = match self.state().phase {
            Phase::Running if !*self.ended.borrow() => return Ok(()),
            Phase::Running => Phase::Exited,
            phase => phase,
        };
        Err(Error::Phase {
            id: self.id.clone(),
            phase: phase.name(),
            wanted: Phase::Running.name(),
        })
    }

    /// Whether commands can be run in it.
    pub(super) fn check_takes_commands(&self) -> Result<(), Error> {
        let waits = self.state().phase == Phase::Created && !*self.ended.borrow();
        if self.guest && waits {
            return Ok(());
        }
        self.check_running()
    }

    pub(super) fn oom_score(&self) -> MutexGuard<'_, Option<i32>> {
        // Every change is one assignment.
        self.oom_score
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Who a process is that is run in it now.
    pub(super) fn identity(&self) -> Identity {
        let mut identity = self.identity.clone();
        let score = *self.oom_score();
        if let Some(score) = score.and_then(|score| CString::new(score.to_string()).ok()) {
            identity.oom_score_adj = Some(score);
        }
        identity
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for the next command in it.
    pub(super) fn next_exec(&self) -> u64 {
        self.execs.fetch_add(1, Ordering::Relaxed)
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    pub(super) fn to_api(&self) -> ContainerState {
        let state = self.state();
        let phase = match state.phase {
            Phase::Created => ApiPhase::Created,
            Phase::Starting | Phase::Running => ApiPhase::Running,
            Phase::Exited => ApiPhase::Exited,
        };
        ContainerState {
            id: self.id.clone(),
            phase: phase.into(),
            pid: self.process.pid.unsigned_abs(),
            started_at_unix_nanos: state.started_at,
            exit: state.exit.clone(),
            uid: self.identity.uid,
            gid: self.identity.gid,
            supplemental_groups: self.identity.groups.clone(),
        }
    }
}
