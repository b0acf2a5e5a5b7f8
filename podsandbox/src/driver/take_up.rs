//! After a restart of the daemon: taking up a pod that lives, finishing or
//! undoing what was half done.

use std::sync::Arc;

use vmm_client::Control;
use vmm_client::protocol::VmState;

use super::learn::end;
use super::watch_vm::{self, Ended};
use super::{Driver, Machine};
use crate::Result;
use crate::faults::{self, Posture};
use crate::phase::{PodEvent, PodPhase};
use crate::process::Process;
use crate::record::{ContainerPhase, ContainerRecord, ExitReason};

/// Each try waits for as long as a call to the VMM may take.
const CONNECT_TRIES: u32 = 3;

impl Driver {
    pub(super) async fn take_up(&mut self) {
        match self.context.faults.posture(&self.record.spec.name) {
            Posture::Avoid(ends) if self.record.phase == PodPhase::Ready => {
                return self.avoid(ends);
            }
            Posture::Leave(ends) => {
                self.is_left = Some(ends);
                return self.avoid(ends);
            }
            Posture::Serve | Posture::Avoid(_) => {}
        }
        let result = match self.record.phase {
            PodPhase::Reserved | PodPhase::Starting => self.forget_half_made().await,
            PodPhase::Ready => self.reconnect().await,
            PodPhase::Stopping => self.stop().await,
            PodPhase::Stopped => {
                self.publish();
                Ok(())
            }
            PodPhase::Removing => self.remove().await,
        };
        if let Err(error) = result {
            // The pod stays listed as not ready; the driver tries again.
            tracing::error!(pod = %self.record.id, error = %error.sentence(), "cannot take up the pod");
            self.record.failure = Some(error.sentence());
            self.advance_anyway(PodEvent::DaemonRestarted).await;
        }
    }

    /// For a pod that has ended the daemon: it is shown as failed and asked for
    /// nothing. On record it stays what it was; a daemon without the fault takes
    /// it up.
    fn avoid(&mut self, ends: u32) {
        let refusal = self.context.faults.refusal(&self.record.spec.name, ends);
        let reason = refusal.sentence();
        tracing::error!(pod = %self.record.id, %reason, "left alone");
        for record in self.containers.values_mut() {
            end(record, ExitReason::Unknown, &reason);
        }
        self.record.failure = Some(reason);
        self.publish();
    }

    async fn forget_half_made(&mut self) -> Result<()> {
        tracing::info!(pod = %self.record.id, "undoing a pod that was being started when the daemon ended");
        self.undo_and_forget().await
    }

    async fn reconnect(&mut self) -> Result<()> {
        if self.record.failure.is_some() {
            // The daemon's end may have come before theirs.
            self.end_orphans().await;
            self.publish();
            return Ok(());
        }
        match self.connect().await {
            Ok(machine) => {
                self.machine = Some(machine);
                self.set_balloon().await;
                self.give_up_shells();
                if let Err(error) = self.finish_containers().await {
                    tracing::warn!(pod = %self.record.id, error = %error.sentence(), "a container cannot be cleared away yet");
                }
                self.free_ended();
                self.publish();
                if !self.record.spec.host_namespaces.network {
                    self.check_network();
                }
                tracing::info!(pod = %self.record.id, containers = self.containers.len(), "took up a running pod");
                Ok(())
            }
            Err(Ended { end, reason }) => {
                self.context.observer.machine_ended(end);
                self.record.failure = Some(self.ended(&reason));
                self.end_orphans().await;
                self.context.store.put_pod(&self.record).await?;
                self.end_containers(ExitReason::Unknown, &reason).await;
                self.publish();
                Ok(())
            }
        }
    }

    /// Whoever was at a debug shell lost it with the daemon.
    fn give_up_shells(&mut self) {
        for record in self.containers.values_mut().filter(|c| c.spec.debug) {
            record.phase = ContainerPhase::Removing;
        }
    }

    /// Those whose freeing the daemon's end cut off.
    fn free_ended(&mut self) {
        let ended = |c: &&ContainerRecord| c.phase == ContainerPhase::Exited && c.slot.is_some();
        let ids: Vec<String> = self
            .containers
            .values()
            .filter(ended)
            .map(|c| c.id.clone())
            .collect();
        for id in ids {
            self.begin_freeing(&id);
        }
    }

    /// What became of the pod's network while nobody looked is worth a line to
    /// its operator, and no more: plugins' CHECK is too often wrong to end pods.
    fn check_network(&self) {
        let (context, stopping) = (Arc::clone(&self.context), self.stopping.clone());
        let (id, name) = (self.record.id.clone(), self.record.spec.name.clone());
        faults::spawn(async move {
            tokio::select! {
                () = stopping.cancelled() => {}
                complaint = context.network.check(&id) => if let Some(complaint) = complaint {
                    tracing::warn!(
                        pod = %id,
                        namespace = name.namespace,
                        name = name.name,
                        complaint,
                        "the pod's network is not as CNI plugins made it"
                    );
                },
            }
        });
    }

    /// A VMM that runs is not given up because a call to it failed once.
    async fn connect(&self) -> std::result::Result<Machine, Ended> {
        let mut tries = 0;
        loop {
            let ended = match self.try_connect().await {
                Ok(machine) => return Ok(machine),
                Err(ended) => ended,
            };
            tries += 1;
            let runs = self
                .record
                .vmm_pid
                .is_some_and(|pid| Process::open(pid, &self.record.id).is_some());
            if !runs || tries == CONNECT_TRIES {
                return Err(ended);
            }
        }
    }

    async fn try_connect(&self) -> std::result::Result<Machine, Ended> {
        let gone = |error: vmm_client::ControlError| {
            Ended::lost(format!("while the daemon was away ({error})"))
        };
        let mut control = Control::connect(&self.paths.control).await.map_err(gone)?;
        let status = control.status().await.map_err(gone)?;
        if let VmState::Ended { reason, cause } = status.state {
            let end = cause.into();
            return Err(Ended { end, reason });
        }
        let events = Control::connect(&self.paths.control)
            .await
            .map_err(gone)?
            .subscribe()
            .await
            .map_err(gone)?;
        let agent = self.agent();
        let events = watch_vm::watch(events, agent.clone(), self.stopping.clone());
        Ok(Machine {
            control,
            agent,
            events,
        })
    }

    /// Undoes a create and finishes a remove that the daemon's end cut off.
    pub(super) async fn finish_containers(&mut self) -> Result<()> {
        let half: Vec<String> = self
            .containers
            .values()
            .filter(|c| matches!(c.phase, ContainerPhase::Creating | ContainerPhase::Removing))
            .map(|c| c.id.clone())
            .collect();
        for id in half {
            self.remove_container(&id).await?;
        }
        Ok(())
    }
}
