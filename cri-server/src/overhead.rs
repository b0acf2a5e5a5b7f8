//! What pods cost beyond their containers, measured for as long as they run,
//! against what their RuntimeClasses have declared.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use podsandbox::{Overhead, PodManager, PodSnapshot};
use serde::{Deserialize, Serialize};
use tokio::time::MissedTickBehavior;

use crate::figures;

/// The namespace of pods that drupe's own command line starts. No namespace of
/// Kubernetes can have this name. They are listed only to who selects them by
/// [`TOOL_LABEL`]: the kubelet ends pods that it does not know.
pub const TOOLS_NAMESPACE: &str = "drupe.internal";
pub const TOOL_LABEL: &str = "drupe.internal/tool";

/// Whether it is one of the node's pods rather than of drupe's own tools.
pub fn is_shown(pod: &PodSnapshot) -> bool {
    pod.pod.spec.name.namespace != TOOLS_NAMESPACE
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OverheadConfig {
    /// 0: never.
    pub measure_every_seconds: u64,
}

impl Default for OverheadConfig {
    fn default() -> Self {
        Self {
            measure_every_seconds: 60,
        }
    }
}

/// Of each pod that has a machine, as measured last, by id.
#[derive(Debug, Default)]
pub struct Overheads(Mutex<BTreeMap<String, Measured>>);

#[derive(Clone, Debug)]
pub struct Measured {
    pub handler: String,
    pub overhead: Overhead,
    /// It has been more than was declared, which was told.
    is_told: bool,
}

impl Overheads {
    pub fn all(&self) -> Vec<Measured> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Measured>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures all pods every so often, for as long as it is polled.
    pub async fn keep(&self, pods: &PodManager, config: &OverheadConfig) {
        if config.measure_every_seconds == 0 {
            return std::future::pending().await;
        }
        let every = Duration::from_secs(config.measure_every_seconds);
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let ready = pods.list().into_iter().filter(PodSnapshot::is_ready);
            let figures = figures::of(pods, ready.filter(is_shown).collect()).await;
            let measured = figures.into_iter().map(|(pod, figures)| {
                let overhead = figures.overhead(&pod.pod);
                (pod, overhead)
            });
            self.take(measured);
        }
    }

    /// A pod that was not measured this time is as it was; one that is not
    /// listed is forgotten.
    fn take(&self, pods: impl Iterator<Item = (PodSnapshot, Option<Overhead>)>) {
        let mut before = std::mem::take(&mut *self.lock());
        let mut now = BTreeMap::new();
        for (pod, overhead) in pods {
            let record = &pod.pod;
            let had = before.remove(&record.id);
            let is_told = had.as_ref().is_some_and(|had| had.is_told);
            let measured = overhead.map(|overhead| Measured {
                handler: record.handler.clone(),
                overhead,
                is_told: is_told || tell(&pod, &overhead),
            });
            now.extend(measured.or(had).map(|of| (record.id.clone(), of)));
        }
        *self.lock() = now;
    }
}

/// Once a pod: what it takes moves about the line.
fn tell(pod: &PodSnapshot, overhead: &Overhead) -> bool {
    let Some(declared) = overhead.declared_memory_bytes else {
        return false;
    };
    let is_above = overhead.is_above_declared();
    if is_above {
        let name = &pod.pod.spec.name;
        tracing::warn!(
            pod = %pod.pod.id,
            name = format!("{}/{}", name.namespace, name.name),
            handler = pod.pod.handler,
            overhead_bytes = overhead.memory_bytes,
            declared_bytes = declared,
            "the pod costs more than the overhead that its RuntimeClass declares: `drupe overhead` measures what to declare"
        );
    }
    is_above
}
