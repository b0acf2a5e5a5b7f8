//! What pods and their containers use: what their guests say, bounded by what
//! the node knows.
//!
//! A guest counts its containers, and may say anything: nothing, to go unseen
//! while its node runs out of memory or disk, or everything. The node counts the
//! pod. So the pod's own figures are the node's, and those of its containers are
//! the guest's within them ([`bounds`]). `docs/metrics.md` tells which figure is
//! whose. On the host's kernel all of them are the node's.

mod bounds;
mod host;

use std::collections::BTreeMap;
use std::time::Duration;

use agent_api::{ContainerStats, GuestStats, StatsResponse};
use tokio::time::Instant;

use crate::cgroup::Charge;
use crate::faults;
use crate::manager::PodManager;
use crate::paths::PodPaths;
use crate::record::{ContainerPhase, PodKind};
use crate::snapshot::PodSnapshot;
use bounds::Facts;
pub(crate) use bounds::Seen;
use host::Host;

/// Of one pod, now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Whether the guest has answered.
    pub answered: bool,
    pub pod: PodFigures,
    /// The guest's own, beyond the pod's; as last told where it does not answer.
    pub guest: GuestStats,
    /// Of containers that run, by id.
    pub containers: BTreeMap<String, ContainerStats>,
    pub(crate) charge: Option<Charge>,
}

/// Of the pod as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodFigures {
    pub cpu_nanos: u64,
    pub memory_usage_bytes: u64,
    pub memory_working_set_bytes: u64,
    pub memory_available_bytes: u64,
    /// Processes and threads.
    pub tasks: u64,
}

impl PodManager {
    /// What the pod uses. A guest that does not answer within `patience` changes
    /// nothing of what the node knows; a pod that does not run uses nothing.
    pub async fn figures(&self, pod: &PodSnapshot, patience: Duration) -> Figures {
        let Some(agent) = &pod.agent else {
            return Figures::default();
        };
        let id = &pod.pod.id;
        let said = match tokio::time::timeout(patience, agent.stats()).await {
            Ok(Ok(said)) => Some(said),
            Ok(Err(error)) => {
                tracing::warn!(pod = %id, error = %error.sentence(), "no statistics from the guest");
                None
            }
            Err(_) => {
                tracing::warn!(pod = %id, "the guest is too slow to give statistics");
                None
            }
        };
        if pod.pod.kind == PodKind::Host {
            return of_host(pod, said);
        }
        let (record, scratch) = (pod.pod.clone(), PodPaths::new(self.config(), id).scratch);
        let read = agent.in_scope(async {
            let read = faults::spawn_blocking(move || Host::read(&record, &scratch)).await;
            // A panic ends the daemon; it is being stopped.
            let host = read.unwrap_or_default();
            agent
                .seen()
                .bounded(said.as_ref(), &host, &facts(pod), Instant::now())
        });
        read.await
    }
}

fn facts(pod: &PodSnapshot) -> Facts {
    const MIB: u64 = 1 << 20;
    let runs = |phase| matches!(phase, ContainerPhase::Created | ContainerPhase::Running);
    let running = pod.containers.values().filter(|c| runs(c.phase));
    let limit = |limit: Option<u64>| limit.filter(|limit| *limit > 0);
    Facts {
        machine_bytes: u64::from(pod.pod.machine_mib()) * MIB,
        memory_bytes: u64::from(pod.pod.memory_mib) * MIB,
        containers: running
            .map(|c| (c.id.clone(), limit(c.spec.resources.memory_limit_bytes)))
            .collect(),
    }
}

/// The supervisor reads the node's control groups.
fn of_host(pod: &PodSnapshot, said: Option<StatsResponse>) -> Figures {
    let answered = said.is_some();
    let said = said.unwrap_or_default();
    let guest = said.guest.unwrap_or_default();
    let total = guest.memory_total_bytes;
    let used = total.saturating_sub(guest.memory_available_bytes);
    let containers = said.containers.into_iter();
    let known = containers.filter(|of| pod.containers.contains_key(&of.id));
    Figures {
        answered,
        pod: PodFigures {
            cpu_nanos: guest.cpu_usage_nanos,
            memory_usage_bytes: used,
            memory_working_set_bytes: used,
            memory_available_bytes: guest.memory_available_bytes,
            tasks: guest.process_count,
        },
        guest,
        containers: known.map(|of| (of.id.clone(), of)).collect(),
        charge: None,
    }
}
