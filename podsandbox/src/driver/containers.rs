//! A pod's containers, one verb after another.

use std::os::fd::AsFd;

use tokio::task::JoinError;
use vmm_client::LogToken;

use super::Driver;
use super::disks::slots_of;
use crate::context::{now_nanos, told_nanos};
use crate::record::{ContainerPhase, ContainerRecord, ExitReason, ExitRecord};
use crate::volumes::Bind;
use crate::{Error, Result, log_file, volumes};

/// What a shell reports of a process that SIGKILL ended.
pub(super) const KILLED: i32 = 137;
/// What containerd answers for a process that never ran.
const START_ERROR_CODE: i32 = 128;

/// What came of freeing a container's part of the guest.
pub(super) struct Freed {
    id: String,
    outcome: Result<()>,
}

/// Whether the container's end was not seen but presumed, because it is being
/// removed.
pub(super) fn end_is_presumed(record: &ContainerRecord) -> bool {
    let presumed = |exit: &ExitRecord| exit.presumed;
    record.phase == ContainerPhase::Removing && record.exit.as_ref().is_some_and(presumed)
}

/// Of a container that is over now, whatever became of the clock meanwhile.
pub(super) fn finished_now(record: &ContainerRecord) -> i64 {
    let begun = record.started_at_nanos.max(record.created_at_nanos);
    now_nanos().max(begun)
}

impl Driver {
    /// What the agent says of its containers, when an answer got lost.
    pub(super) async fn list_again(&mut self) -> Result<()> {
        let states = self.machine()?.agent.list().await?;
        self.learn_listing(states).await;
        Ok(())
    }

    /// Frees the binds that no other container has.
    fn unbind_volumes(&self, id: &str) -> Result<()> {
        let Some(record) = self.containers.get(id) else {
            return Ok(());
        };
        let others = || self.containers.values().filter(|c| c.id != id);
        let is_others = |bind: &Bind| others().any(|c| c.binds.iter().any(|b| b.name == bind.name));
        for bind in record.binds.iter().filter(|bind| !is_others(bind)) {
            volumes::unbind(&self.paths.shared, bind)?;
        }
        Ok(())
    }

    /// Lets the guest free what a container that has ended holds there. Other
    /// containers' commands do not wait for it: a guest may take as long as a
    /// call may.
    pub(super) fn begin_freeing(&mut self, id: &str) {
        let Some(machine) = &self.machine else {
            return;
        };
        let (agent, id) = (machine.agent.clone(), id.to_owned());
        self.freeing.spawn(async move {
            let outcome = agent.remove(&id).await;
            Freed { id, outcome }
        });
    }

    /// Frees the VMM's side as well, after the guest's. What fails is tried
    /// again when the container is removed.
    pub(super) async fn learn_freed(&mut self, freed: std::result::Result<Freed, JoinError>) {
        let Ok(Freed { id, outcome }) = freed else {
            // It panicked, or its pod is being stopped.
            return;
        };
        // Gone with the container, or with the machine.
        let held = self.containers.get(&id).is_some_and(holds_slots);
        if !held || self.machine.is_none() {
            return;
        }
        let outcome = match outcome {
            Ok(()) => self.free_vmm_side(&id).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => self.save_logged(&id).await,
            Err(error) => {
                tracing::warn!(container = id, error = %error.sentence(), "cannot free what an ended container held");
            }
        }
    }

    /// Frees what a container that has ended holds in guest and VMM; fine with
    /// any of it being gone. Its record and lease stay.
    async fn free_guest_side(&mut self, id: &str) -> Result<()> {
        let holds = self.containers.get(id).is_some_and(holds_slots);
        if let Some(machine) = self.machine.as_ref().filter(|_| holds) {
            machine.agent.remove(id).await?;
        }
        self.free_vmm_side(id).await
    }

    /// Only once the guest has let go of the disk.
    async fn free_vmm_side(&mut self, id: &str) -> Result<()> {
        let Some(record) = self.containers.get(id) else {
            return Ok(());
        };
        if !holds_slots(record) {
            return Ok(());
        }
        // A disk that another container has too goes with the last of them.
        let slots: Vec<u32> = slots_of(record)
            .filter(|&slot| !self.is_shared(slot, id))
            .collect();
        if self.is_on_host() {
            self.free_on_host(id).await?;
        } else if let Some(machine) = &mut self.machine {
            for slot in slots {
                machine.control.detach_disk(slot).await?;
            }
            // Nobody may take them for attached.
            if let Some(record) = self.containers.get_mut(id) {
                record.device_slots.clear();
            }
            machine.control.close_log(id).await?;
        }
        if let Some(record) = self.containers.get_mut(id) {
            record.slot = None;
            record.volume_slots.clear();
            record.device_slots.clear();
        }
        Ok(())
    }

    pub(super) async fn start_container(&mut self, id: &str) -> Result<()> {
        let record = self.container(id)?;
        if record.phase != ContainerPhase::Created {
            return Err(state_error(
                record,
                "only a created container can be started",
            ));
        }
        let started = self.machine()?.agent.start(id).await;
        let now = now_nanos();
        if matches!(
            started,
            Err(Error::AgentLink { .. } | Error::AgentTimeout { .. })
        ) {
            // Whether it runs is the agent's to say.
            self.list_again().await?;
        }
        let Some(record) = self.containers.get_mut(id) else {
            return Err(Error::ContainerNotFound(id.to_owned()));
        };
        match &started {
            Ok(at) => {
                // Its exit may have been told already.
                if record.phase == ContainerPhase::Created {
                    record.phase = ContainerPhase::Running;
                }
                if record.started_at_nanos == 0 {
                    let created = record.created_at_nanos;
                    record.started_at_nanos = told_nanos(*at, created, now);
                }
            }
            // It was killed before; its exit event is on the way.
            Err(Error::Agent {
                code: tonic::Code::FailedPrecondition,
                ..
            }) => {}
            Err(Error::Agent { message, .. }) if record.exit.is_none() => {
                record.phase = ContainerPhase::Exited;
                record.exit = Some(ExitRecord {
                    code: START_ERROR_CODE,
                    finished_at_nanos: finished_now(record),
                    reason: ExitReason::StartError,
                    message: message.clone(),
                    presumed: false,
                });
            }
            Err(_) => {}
        }
        self.save_container(id).await?;
        // It has no process, and so no id to show, before its start.
        if started.is_ok()
            && self.is_on_host()
            && let Err(error) = self.list_again().await
        {
            tracing::warn!(container = id, error = %error.sentence(), "its process id is not known");
        }
        started.map(|_| ())
    }

    pub(super) async fn signal_container(&mut self, id: &str, signal: u32) -> Result<()> {
        let record = self.container(id)?;
        if !matches!(
            record.phase,
            ContainerPhase::Running | ContainerPhase::Created
        ) {
            return Ok(());
        }
        match self.machine()?.agent.signal(id, signal, false).await {
            // It ended in between; its exit event is on the way.
            Err(Error::Agent {
                code: tonic::Code::NotFound | tonic::Code::FailedPrecondition,
                ..
            }) => Ok(()),
            other => other,
        }
    }

    pub(super) async fn remove_container(&mut self, id: &str) -> Result<()> {
        let Some(record) = self.containers.get_mut(id) else {
            return Ok(());
        };
        record.phase = ContainerPhase::Removing;
        let finished_at_nanos = finished_now(record);
        record.exit.get_or_insert_with(|| ExitRecord {
            code: KILLED,
            finished_at_nanos,
            reason: ExitReason::Error,
            message: "the container was removed".to_owned(),
            presumed: true,
        });
        if let Err(error) = self.save_container(id).await {
            // What it holds may be what the disk is short of.
            tracing::error!(container = id, error = %error.sentence(), "cannot record a removal");
        }
        self.free_guest_side(id).await?;
        self.unbind_volumes(id)?;
        if let Some(record) = self.containers.get(id) {
            self.release_disks(&record.spec, id).await?;
        }
        self.context.store.delete_container(id).await?;
        self.containers.remove(id);
        if let Some(machine) = &self.machine {
            machine.agent.budget().forget(id);
        }
        self.publish();
        Ok(())
    }

    pub(super) async fn reopen_log(&mut self, id: &str) -> Result<()> {
        let record = self.container(id)?;
        if record.phase != ContainerPhase::Running {
            return Err(state_error(
                record,
                "only a running container's log can be reopened",
            ));
        }
        let record = record.clone();
        // Its token stays what it is.
        self.open_log(&record, None).await
    }

    /// What the streams of a new log are known by. `None` without a log, and
    /// where an older daemon started the monitor, which asks for none.
    pub(super) async fn new_log_token(
        &mut self,
        record: &ContainerRecord,
    ) -> Result<Option<LogToken>> {
        if record.log_file.is_none() {
            return Ok(None);
        }
        let status = self.machine_mut()?.control.status().await?;
        Ok(status.log_tokens.then(|| LogToken::new(rand::random())))
    }

    /// Hands the container's log to whoever writes it, if it has one.
    pub(super) async fn open_log(
        &mut self,
        record: &ContainerRecord,
        token: Option<LogToken>,
    ) -> Result<()> {
        let directory = self.record.spec.log_directory.as_deref();
        let (Some(directory), Some(path)) = (directory, &record.log_file) else {
            return Ok(());
        };
        let file = log_file::open(directory, path)?;
        let control = &mut self.machine_mut()?.control;
        Ok(control.open_log(&record.id, token, file.as_fd()).await?)
    }

    pub(super) fn container(&self, id: &str) -> Result<&ContainerRecord> {
        self.containers
            .get(id)
            .ok_or_else(|| Error::ContainerNotFound(id.to_owned()))
    }
}

fn holds_slots(record: &ContainerRecord) -> bool {
    slots_of(record).next().is_some()
}

pub(crate) fn state_error(record: &ContainerRecord, needed: &'static str) -> Error {
    let state = match record.phase {
        ContainerPhase::Creating => "being created",
        ContainerPhase::Created => "created",
        ContainerPhase::Running => "running",
        ContainerPhase::Exited => "exited",
        ContainerPhase::Removing => "being removed",
    };
    Error::ContainerState {
        id: record.id.clone(),
        state,
        needed,
    }
}
