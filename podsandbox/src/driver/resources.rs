//! Resources that change while a pod runs: limits inside the guest, and the
//! guest's own memory.
//!
//! A machine cannot get more memory than it was started with; what its guest is
//! not to have lies in the balloon. See [`crate::sizing`] for how much that is.
//! A pod on the host's kernel has limits only.

use super::containers::state_error;
use super::create::check_huge_pages;
use super::{Driver, max_vcpus};
use crate::config::Engine;
use crate::phase::PodPhase;
use crate::record::{ContainerPhase, PodRecord};
use crate::resize::{ContainerChange, PodChange, explicit};
use crate::sizing::{self, Bounds};
use crate::spec::Resources;
use crate::{Error, Result};

impl Driver {
    pub(super) async fn update_container(
        &mut self,
        id: &str,
        change: &ContainerChange,
    ) -> Result<()> {
        let record = self.container(id)?;
        let before = record.spec.resources.clone();
        let after = change.on(&before);
        check_huge_pages(self.is_on_host(), &change.hugepage_limits)?;
        match record.phase {
            ContainerPhase::Creating | ContainerPhase::Removing => {
                return Err(state_error(record, "its resources cannot be changed"));
            }
            ContainerPhase::Created | ContainerPhase::Running => {
                self.apply(id, &before, &after).await?;
            }
            ContainerPhase::Exited => {}
        }
        if let Some(record) = self.containers.get_mut(id) {
            record.spec.resources = after;
        }
        self.save_container(id).await
    }

    /// Limits in the guest, which first grows if it has to.
    async fn apply(&mut self, id: &str, before: &Resources, after: &Resources) -> Result<()> {
        let score = (after.oom_score_adj != before.oom_score_adj).then_some(after.oom_score_adj);
        if self.is_on_host() {
            return self.apply_on_host(id, after, score).await;
        }
        let resources = explicit(after)?;
        let agent = self.machine()?.agent.clone();
        let had = self.record.clone();
        if let Some(limit) = after.memory_limit_bytes
            && after.memory_limit_bytes > before.memory_limit_bytes
        {
            let wanted_mib = self.memory_for(limit, &had.spec.overhead)?;
            if wanted_mib > had.memory_mib {
                let record = PodRecord {
                    memory_mib: wanted_mib,
                    ..had.clone()
                };
                self.resize(record).await?;
            }
        }
        match agent.update(id, &resources, score).await {
            // It has ended and gone; its exit event is on the way.
            Err(Error::Agent {
                code: tonic::Code::NotFound,
                ..
            }) => Ok(()),
            Err(error) => {
                if self.record.memory_mib != had.memory_mib
                    && let Err(left) = self.resize(had).await
                {
                    tracing::warn!(pod = %self.record.id, error = %left.sentence(), "the guest keeps memory that it was given for an update that failed");
                }
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    pub(super) async fn update_pod(&mut self, change: PodChange) -> Result<()> {
        let mut record = self.record.clone();
        if let Some(resources) = change.resources {
            record.spec.resources = resources;
        }
        if let Some(overhead) = change.overhead {
            record.spec.overhead = overhead;
        }
        // A pod that states no limit any more keeps what it has; one on the
        // host's kernel has no memory that could be sized.
        if let Some(limit) = record.spec.resources.memory_limit_bytes
            && !self.is_on_host()
        {
            record.memory_mib = self.memory_for(limit, &record.spec.overhead)?;
        }
        self.resize(record).await
    }

    fn memory_for(&self, limit: u64, overhead: &Resources) -> Result<u32> {
        let (_, runtime) = self.context.config.runtime(&self.record.handler)?;
        let most_vcpus = match &runtime.engine {
            Engine::Machine(decision) => max_vcpus(decision),
            // The configuration has changed since the pod was started.
            Engine::Oci(_) => self.record.vcpus,
        };
        let bounds = Bounds::of_this_node(most_vcpus);
        Ok(sizing::memory_for(
            &runtime.settings,
            limit,
            overhead,
            bounds,
        ))
    }

    /// Makes the pod what `record` says; if it cannot be, it stays what it is.
    async fn resize(&mut self, mut record: PodRecord) -> Result<()> {
        let runs = self.record.phase == PodPhase::Ready && self.record.failure.is_none();
        record.machine_mib = self.record.machine_mib();
        if record.memory_mib > record.machine_mib {
            return Err(Error::MachineTooSmall {
                id: record.id,
                wanted_mib: record.memory_mib,
                machine_mib: record.machine_mib,
            });
        }
        let moves = runs && record.memory_mib != self.record.memory_mib;
        if moves {
            let control = &mut self.machine_mut()?.control;
            control.set_balloon(record.balloon_mib()).await?;
        }
        if let Err(error) = self.context.store.put_pod(&record).await {
            if moves {
                self.set_balloon().await;
            }
            return Err(error.into());
        }
        self.record = record;
        self.publish();
        Ok(())
    }

    /// Tells the guest again what it is to have: a daemon that was ended between
    /// telling and recording may have left something else.
    pub(super) async fn set_balloon(&mut self) {
        if self.is_on_host() {
            return;
        }
        let mib = self.record.balloon_mib();
        let Some(machine) = &mut self.machine else {
            return;
        };
        if let Err(error) = machine.control.set_balloon(mib).await {
            tracing::warn!(pod = %self.record.id, %error, "the guest may have other memory than recorded");
        }
    }
}
