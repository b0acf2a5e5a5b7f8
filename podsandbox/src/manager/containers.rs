//! Containers of any pod: found by id, and their life cycle.

use std::sync::Arc;
use std::time::Duration;

use super::PodManager;
use crate::driver::{Command, Handle};
use crate::record::{ContainerPhase, ContainerRecord};
use crate::snapshot::PodSnapshot;
use crate::spec::ContainerSpec;
use crate::{Error, Result, signals};

/// SIGKILL is not refused; this is for a guest that hangs.
const KILL_WAIT: Duration = Duration::from_secs(10);
const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

impl PodManager {
    pub(super) fn existing(&self, id: &str) -> Result<(Handle, Arc<ContainerRecord>)> {
        let (handle, _, container) = self
            .find_container(id)?
            .ok_or_else(|| Error::ContainerNotFound(id.to_owned()))?;
        Ok((handle, container))
    }

    pub async fn create_container(&self, pod: &str, spec: ContainerSpec) -> Result<String> {
        let handle = self
            .find(pod)?
            .ok_or_else(|| Error::PodNotFound(pod.to_owned()))?;
        handle
            .ask(|reply| Command::Create {
                spec: Box::new(spec),
                reply,
            })
            .await
    }

    pub async fn start_container(&self, id: &str) -> Result<()> {
        let (handle, container) = self.existing(id)?;
        handle
            .ask(|reply| Command::Start {
                id: container.id.clone(),
                reply,
            })
            .await
    }

    /// Asks the container to end, then ends it. Stopped or unknown to a pod
    /// that is gone: no error.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let Some((handle, _, container)) = self.find_container(id)? else {
            return Ok(());
        };
        if container.exit.is_some() {
            return Ok(());
        }
        let signal = |signal| {
            let (handle, id) = (handle.clone(), container.id.clone());
            async move {
                handle
                    .ask(|reply| Command::Signal { id, signal, reply })
                    .await
            }
        };
        // A process that waits for its exec as PID 1 does not hear SIGTERM.
        if !grace.is_zero() && container.phase == ContainerPhase::Running {
            signal(signals::parse(&container.stop_signal).unwrap_or(SIGTERM)).await?;
            if tokio::time::timeout(grace, over(&handle, &container.id))
                .await
                .is_ok()
            {
                return Ok(());
            }
        }
        signal(SIGKILL).await?;
        tokio::time::timeout(KILL_WAIT, over(&handle, &container.id))
            .await
            .map_err(|_| Error::Unkillable {
                id: container.id.clone(),
                seconds: KILL_WAIT.as_secs(),
            })
    }

    /// RemoveContainer, of a running one too; an unknown one is no error.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let Some((handle, _, container)) = self.find_container(id)? else {
            return Ok(());
        };
        match handle
            .ask(|reply| Command::RemoveContainer {
                id: container.id.clone(),
                reply,
            })
            .await
        {
            Err(Error::PodNotFound(_)) => Ok(()),
            other => other,
        }
    }

    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let (handle, container) = self.existing(id)?;
        handle
            .ask(|reply| Command::ReopenLog {
                id: container.id.clone(),
                reply,
            })
            .await
    }
}

/// Waits until the container has exited or is gone.
async fn over(handle: &Handle, id: &str) {
    let mut snapshot = handle.snapshot.clone();
    let done = |snapshot: &PodSnapshot| {
        snapshot.gone
            || snapshot
                .containers
                .get(id)
                .is_none_or(|container| container.exit.is_some())
    };
    if snapshot.wait_for(done).await.is_err() {
        tracing::debug!(container = id, "the pod's driver ended");
    }
}
