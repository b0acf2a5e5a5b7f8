//! Freeing what a pod holds, in the order opposite to its making.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use vmm_client::Control;

use super::Driver;
use crate::process::Process;
use crate::record::{ExitReason, PodPhase};
use crate::{Error, Result, cgroup, scratch, volumes};

/// A killed VMM takes its guest along at once; the kernel frees its memory.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

impl Driver {
    /// StopPodSandbox: ends the machine and frees network, volumes and disks.
    /// Done again for a pod that is stopped, it does nothing.
    pub(super) async fn stop(&mut self) -> Result<()> {
        if self.record.phase == PodPhase::Stopped {
            return Ok(());
        }
        self.enter(PodPhase::Stopping).await?;
        if let Some(machine) = self.machine.take() {
            // So that what volumes were promised is written; a guest that
            // hangs is not waited for.
            if let Err(error) = machine.agent.shutdown().await {
                tracing::debug!(pod = %self.record.id, error = %error.sentence(), "guest did not shut down");
            }
        }
        self.end_containers(ExitReason::Error, "the pod was stopped").await;
        self.undo().await?;
        self.enter(PodPhase::Stopped).await
    }

    /// RemovePodSandbox: the pod stopped, its containers and records removed.
    pub(super) async fn remove(&mut self) -> Result<()> {
        if !matches!(self.record.phase, PodPhase::Stopped | PodPhase::Removing) {
            self.stop().await?;
        }
        self.enter(PodPhase::Removing).await?;
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            self.remove_container(&id).await?;
        }
        self.context.store.delete_pod(&self.record.id).await?;
        self.finish_gone();
        Ok(())
    }

    /// Frees everything a pod of this id may hold outside its record. Every
    /// step is fine with what it frees being gone already, so it serves a
    /// failed start, a stop, and what a killed daemon left.
    pub(super) async fn undo(&self) -> Result<()> {
        let vmm = self.record.vmm_pid.and_then(|pid| Process::open(pid, &self.record.id));
        end_machine(&self.paths.control, vmm).await?;
        if let Some(group) = &self.record.cgroup {
            cgroup::remove(group, &self.record.id)?;
        }
        self.context.network.del(&self.record.id).await?;
        netns::Netns::remove_at(&self.context.config.netns_dir, &self.paths.netns_name).await?;
        let volumes_of = self.containers.keys().map(|id| self.paths.volumes(id));
        for dir in volumes_of {
            volumes::unbind_all(&dir)?;
        }
        volumes::unmount(&self.paths.shared)?;
        scratch::remove(&self.paths.scratch)?;
        match fs::remove_dir_all(&self.paths.dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::File { what: "pod directory", path: self.paths.dir.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

/// Ends the VMM behind `control` and waits until it is gone. The process, where
/// it is known, tells that everything the VMM had started is gone as well.
async fn end_machine(control: &Path, process: Option<Process>) -> Result<()> {
    let late = || Error::VmEnded(format!("not within {} s of being told to", KILL_TIMEOUT.as_secs()));
    if let Some(process) = process {
        process.kill();
        return if process.ended_within(KILL_TIMEOUT).await { Ok(()) } else { Err(late()) };
    }
    // Without a listening end there is no VMM.
    let Ok(connection) = Control::connect(control).await else { return Ok(()) };
    let gone = async {
        let Ok(mut events) = connection.subscribe().await else { return };
        if let Ok(mut kill) = Control::connect(control).await
            && let Err(error) = kill.kill().await
        {
            tracing::debug!(%error, "the VMM ended before it was told to");
        }
        while let Ok(Some(_)) = events.next().await {}
    };
    tokio::time::timeout(KILL_TIMEOUT, gone).await.map_err(|_| late())
}
