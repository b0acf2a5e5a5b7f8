//! What a pod costs its node beyond its containers: the VMM, the guest's
//! kernel, the agent, and memory that the guest holds but its containers do
//! not use.
//!
//! The node's side is what the kernel has charged the pod's control groups;
//! the containers' side is the guest's word within that ([`crate::figures`]), so
//! a hostile guest can make its overhead look smaller, never what the node is
//! charged.

use agent_api::ContainerStats;
use serde::{Deserialize, Serialize};

use crate::cgroup::{self, Charge};
use crate::figures::Figures;
use crate::manager::PodManager;
use crate::record::{PodKind, PodRecord};
use crate::snapshot::PodSnapshot;
use crate::{Error, Result};

/// Of one pod, now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Overhead {
    /// Beyond what containers use. Files that the node caches for the pod are
    /// not in it: it drops them when it needs the memory.
    pub memory_bytes: u64,
    /// What the pod's RuntimeClass has declared; none: nothing.
    pub declared_memory_bytes: Option<u64>,
    /// CPU time since the pod's start, beyond its containers'.
    pub cpu_nanos: u64,
}

impl Overhead {
    fn new(pod: &PodRecord, charge: Charge, figures: &Figures) -> Self {
        let memory = of_containers(figures, |container| container.memory_usage_bytes);
        let cpu = of_containers(figures, |container| container.cpu_usage_nanos);
        Self {
            memory_bytes: charge.memory_bytes.saturating_sub(memory),
            declared_memory_bytes: pod.spec.overhead.memory_limit_bytes,
            cpu_nanos: charge.cpu_nanos.saturating_sub(cpu),
        }
    }

    /// Whether it is more than was declared.
    #[must_use]
    pub fn is_above_declared(&self) -> bool {
        self.declared_memory_bytes
            .is_some_and(|declared| self.memory_bytes > declared)
    }
}

impl Figures {
    /// What the pod costs beyond its containers; none while its guest does not
    /// answer, for a pod on the host's kernel, and where the node does not tell.
    #[must_use]
    pub fn overhead(&self, pod: &PodRecord) -> Option<Overhead> {
        let charge = self.charge.filter(|_| self.answered)?;
        Some(Overhead::new(pod, charge, self))
    }
}

impl PodManager {
    /// Memory of the pod's processes (PSS) less what its containers use.
    pub async fn proportional_overhead(
        &self,
        pod: &PodSnapshot,
        figures: &Figures,
    ) -> Result<Option<u64>> {
        let (PodKind::MicroVm, Some(parent)) = (pod.pod.kind, pod.pod.cgroup.clone()) else {
            return Ok(None);
        };
        let id = pod.pod.id.clone();
        let work = move || cgroup::proportional_bytes(&parent, &id);
        let all = tokio::task::spawn_blocking(work).await;
        let all = all.map_err(|_| Error::Stopping)??;
        let used = of_containers(figures, |container| container.memory_usage_bytes);
        Ok(Some(all.saturating_sub(used)))
    }
}

fn of_containers(figures: &Figures, figure: fn(&ContainerStats) -> u64) -> u64 {
    let all = figures.containers.values().map(figure);
    all.fold(0, u64::saturating_add)
}
