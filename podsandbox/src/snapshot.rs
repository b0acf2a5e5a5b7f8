//! What the rest of the daemon sees of a pod: a value, published by its driver
//! after every change. Reading one never waits for a boot.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::agent::AgentClient;
use crate::record::{ContainerRecord, PodPhase, PodRecord};

#[derive(Clone, Debug)]
pub struct PodSnapshot {
    pub pod: Arc<PodRecord>,
    /// Without those of debug shells.
    pub containers: BTreeMap<String, Arc<ContainerRecord>>,
    /// Present while the pod's machine runs and its agent serves.
    pub agent: Option<AgentClient>,
    /// The driver has ended: the pod is no more.
    pub gone: bool,
}

impl PodSnapshot {
    /// Whether CRI should list it: a pod that is still being started has not
    /// been promised to anyone.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        !self.gone && self.pod.phase.is_shown()
    }

    /// SANDBOX_READY of CRI.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.pod.phase == PodPhase::Ready && self.pod.failure.is_none()
    }
}
