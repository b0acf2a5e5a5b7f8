//! Freeing what a pod holds, in the order opposite to its making.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use vmm_client::{Control, ControlError};

use super::Driver;
use super::watch_vm::VmEvent;
use crate::observer::MachineEnd;
use crate::phase::{PodEvent, PodPhase};
use crate::process::Process;
use crate::record::ExitReason;
use crate::{Error, Result, scratch, volumes};

/// A killed VMM takes its guest along at once, and the kernel frees its memory;
/// on a node whose CPUs are all busy that was seen to take 15 s. Nobody gains by
/// an error that has the stop asked for again.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

impl Driver {
    /// StopPodSandbox: ends the machine and frees network, volumes and disks.
    /// Done again for a pod that is stopped, it does nothing.
    pub(super) async fn stop(&mut self) -> Result<()> {
        match self.record.phase {
            PodPhase::Stopped => return Ok(()),
            // Stopping is part of it.
            PodPhase::Removing => return self.remove_rest().await,
            _ => self.advance_anyway(PodEvent::StopAsked).await,
        }
        if let Some(mut machine) = self.machine.take() {
            let mut end = MachineEnd::Stopped;
            // Exits that were told before the stop are the true ones.
            while let Ok(event) = machine.events.try_recv() {
                match event {
                    VmEvent::Exit { container, exit } => self.learn_exit(&container, exit).await,
                    VmEvent::Ended(ended) => end = ended.end,
                    VmEvent::Listing(_) | VmEvent::WatcherGone => {}
                }
            }
            self.context.observer.machine_ended(end);
            // The answer comes when the containers are dead, the host has their
            // output and the disks are written: from there on killing the
            // machine loses nothing. A guest that hangs is not waited for.
            if let Err(error) = machine.agent.shutdown().await {
                tracing::debug!(pod = %self.record.id, error = %error.sentence(), "guest did not shut down");
            }
        }
        self.end_containers(ExitReason::Error, "the pod was stopped")
            .await;
        self.undo().await?;
        self.has_orphans = false;
        self.record.failure = None;
        self.advance(PodEvent::Freed).await
    }

    /// RemovePodSandbox: the pod stopped, its containers and records removed.
    pub(super) async fn remove(&mut self) -> Result<()> {
        if !matches!(self.record.phase, PodPhase::Stopped | PodPhase::Removing) {
            self.stop().await?;
        }
        self.advance_anyway(PodEvent::RemoveAsked).await;
        self.remove_rest().await
    }

    async fn remove_rest(&mut self) -> Result<()> {
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            self.remove_container(&id).await?;
        }
        self.undo().await?;
        self.advance(PodEvent::Freed).await
    }

    /// For a pod that nobody was promised.
    pub(super) async fn undo_and_forget(&self) -> Result<()> {
        self.undo().await?;
        self.forget().await
    }

    /// Frees everything a pod of this id may hold outside its record. Every
    /// step is fine with what it frees being gone already, so it serves a
    /// failed start, a stop, and what a killed daemon left. A step that fails
    /// does not keep the others from being taken; the first error is returned.
    pub(super) async fn undo(&self) -> Result<()> {
        let id = &self.record.id;
        let machine = async {
            let ended = end_machine(&self.paths.control, self.monitor()).await;
            ended.and(self.remove_groups().await)
        };
        // Neither needs the other: what the guest still sends goes nowhere.
        let (ended, detached) = tokio::join!(machine, self.context.network.del(id));
        let mut outcome = ended;
        outcome = outcome.and(match detached {
            // The plugins may still need the namespace when DEL is tried again.
            Err(error) => Err(error),
            Ok(()) => {
                netns::Netns::remove_at(&self.context.config.netns_dir, &self.paths.netns_name)
                    .await
                    .map_err(Error::from)
            }
        });
        outcome = outcome.and(self.remove_dir());
        if self.is_on_host() {
            return outcome.and(self.remove_written().await);
        }
        outcome.and(scratch::remove(&self.paths.scratch))
    }

    fn remove_dir(&self) -> Result<()> {
        // Nothing may be removed through a mount.
        volumes::unmount_below(&self.paths.dir)?;
        match fs::remove_dir_all(&self.paths.dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::File {
                what: "pod directory",
                path: self.paths.dir.clone(),
                source,
            }),
            _ => Ok(()),
        }
    }
}

/// Ends the VMM behind `control` and waits until it is gone. The process, where
/// it is known, tells that everything the VMM had started is gone as well.
async fn end_machine(control: &Path, process: Option<Process>) -> Result<()> {
    let late = || {
        Error::VmEnded(format!(
            "not within {} s of being told to",
            KILL_TIMEOUT.as_secs()
        ))
    };
    if let Some(process) = process {
        process.kill();
        return if process.ended_within(KILL_TIMEOUT).await {
            Ok(())
        } else {
            Err(late())
        };
    }
    let connection = match Control::connect(control).await {
        Ok(connection) => connection,
        Err(error) if is_gone(&error) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let gone = async {
        let Ok(mut events) = connection.subscribe().await else {
            return;
        };
        if let Ok(mut kill) = Control::connect(control).await
            && let Err(error) = kill.kill().await
        {
            tracing::debug!(%error, "the VMM ended before it was told to");
        }
        while let Ok(Some(_)) = events.next().await {}
    };
    tokio::time::timeout(KILL_TIMEOUT, gone)
        .await
        .map_err(|_| late())
}

/// Without a listening end there is no VMM.
pub(super) fn is_gone(error: &ControlError) -> bool {
    match error {
        ControlError::Connect { source, .. } => {
            matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            )
        }
        ControlError::Gone { .. } => true,
        _ => false,
    }
}
