//! What talks to a pod's processes: exec, attach and forwarded ports.

use std::sync::Arc;
use std::time::Duration;

use agent_api::exec_sync_event::Event as ExecEvent;
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;

use super::PodManager;
use crate::agent::budget::permits;
use crate::record::{ContainerPhase, ContainerRecord};
use crate::session::{AttachOptions, ExecOptions, Session};
use crate::snapshot::PodSnapshot;
use crate::{AgentClient, Error, Result};

/// What ExecSync returns of each stream at most; the field's runtimes agree.
const EXEC_OUTPUT_LIMIT: usize = 16 << 20;
/// The first piece of room for output; a probe says a line.
const FIRST_ROOM: usize = 4 << 10;
/// Beyond an exec's own time-out: for the answer to travel.
const EXEC_GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
    pub timed_out: bool,
    /// There was no room for more of it.
    is_cut: bool,
    /// Room for it, which all guests share.
    room: Vec<OwnedSemaphorePermit>,
}

impl ExecOutput {
    /// What is beyond the limit is dropped, as the field's runtimes do; and what
    /// there is no room for while other commands have said a lot.
    fn take(&mut self, bytes: &[u8], of: Of, agent: &AgentClient) {
        let to = match of {
            Of::Stdout => &mut self.stdout,
            Of::Stderr => &mut self.stderr,
        };
        let left = EXEC_OUTPUT_LIMIT.saturating_sub(to.len());
        let bytes = &bytes[..bytes.len().min(left)];
        let (wanted, has) = (to.len() + bytes.len(), to.capacity());
        if wanted > has && !self.is_cut {
            let size = EXEC_OUTPUT_LIMIT.min(wanted.max(has * 2).max(FIRST_ROOM));
            let all = Arc::clone(agent.budget().output());
            match all.try_acquire_many_owned(permits(size - has)) {
                Ok(room) => {
                    to.reserve_exact(size - to.len());
                    self.room.push(room);
                }
                Err(_) => self.is_cut = true,
            }
        }
        if !self.is_cut {
            to.extend_from_slice(bytes);
        }
    }
}

enum Of {
    Stdout,
    Stderr,
}

impl PodManager {
    pub async fn exec_sync(
        &self,
        id: &str,
        argv: Vec<String>,
        timeout: Option<Duration>,
    ) -> Result<ExecOutput> {
        let (agent, container) = self.running(id, "exec needs a running container").await?;
        let request = agent_api::ExecSyncRequest {
            container_id: container.id.clone(),
            argv,
            timeout_millis: timeout.map_or(0, |t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
        };
        let work = collect(&agent, request);
        match timeout {
            None => work.await,
            // The agent keeps the time; this is for one that hangs.
            Some(limit) => tokio::time::timeout(limit + EXEC_GRACE, work)
                .await
                .unwrap_or(Ok(ExecOutput {
                    timed_out: true,
                    ..ExecOutput::default()
                })),
        }
    }

    /// A container that runs, and the agent of its pod.
    async fn running(
        &self,
        id: &str,
        needed: &'static str,
    ) -> Result<(AgentClient, Arc<ContainerRecord>)> {
        let (mut handle, _) = self.existing(id)?;
        handle.settled().await;
        let (snapshot, container) = self.container(id)?;
        if container.phase != ContainerPhase::Running {
            return Err(crate::driver::state_error(&container, needed));
        }
        Ok((serving(&snapshot)?, container))
    }

    /// Runs a command with streams of its own. Returns once it runs; one that
    /// cannot be run is an error. It is killed, with all it has started, when
    /// the session is dropped before its exit.
    pub async fn exec(&self, mut options: ExecOptions) -> Result<Session> {
        let needed = "exec needs a running container";
        let (agent, container) = self.running(&options.container_id, needed).await?;
        options.container_id.clone_from(&container.id);
        agent.exec(options).await
    }

    /// Joins a container's streams: its output from now on. Dropping the
    /// session leaves the container as it is.
    pub async fn attach(&self, mut options: AttachOptions) -> Result<Session> {
        let needed = "attach needs a running container";
        let (agent, container) = self.running(&options.container_id, needed).await?;
        options.container_id.clone_from(&container.id);
        agent.attach(options).await
    }

    /// A connection to what listens on `port` of the pod's loopback: IPv4
    /// first, then IPv6. `shutdown` ends one direction.
    pub async fn port_forward(&self, pod: &str, port: u16) -> Result<UnixStream> {
        let mut handle = self
            .find(pod)?
            .ok_or_else(|| Error::PodNotFound(pod.to_owned()))?;
        handle.settled().await;
        let snapshot = self.pod(pod)?;
        let agent = serving(&snapshot)?;
        agent.port_forward(&snapshot.pod.id, port).await
    }
}

pub(super) fn serving(snapshot: &PodSnapshot) -> Result<AgentClient> {
    snapshot.agent.clone().ok_or_else(|| Error::PodNotReady {
        id: snapshot.pod.id.clone(),
        state: snapshot.pod.failure.clone().unwrap_or_default(),
    })
}

async fn collect(agent: &AgentClient, request: agent_api::ExecSyncRequest) -> Result<ExecOutput> {
    let mut stream = agent.exec_sync(request).await?;
    let mut output = ExecOutput::default();
    while let Some(event) = agent
        .in_scope(stream.message())
        .await
        .map_err(|status| crate::agent::refused("ExecSync", &status))?
    {
        match event.event {
            Some(ExecEvent::Stdout(bytes)) => output.take(&bytes, Of::Stdout, agent),
            Some(ExecEvent::Stderr(bytes)) => output.take(&bytes, Of::Stderr, agent),
            Some(ExecEvent::Exit(exit)) => {
                output.exit_code = exit.code;
                output.timed_out = exit.timed_out;
                return Ok(output);
            }
            None => {}
        }
    }
    Err(Error::VmEnded(
        "the exec's stream broke before its exit code".to_owned(),
    ))
}
