//! Gauges of pods and containers, read from the manager's snapshots when they
//! are scraped.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use podsandbox::PodManager;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::labels::{self, CONTAINER_STATES, POD_PHASES};
use super::machines::Machines;
use super::overhead;
use crate::overhead::Overheads;

pub(super) struct Pods {
    pods: PodManager,
    overheads: Arc<Overheads>,
    handlers: Vec<String>,
}

impl Pods {
    pub(super) fn new(pods: PodManager, overheads: Arc<Overheads>, handlers: Vec<String>) -> Self {
        Self {
            pods,
            overheads,
            handlers,
        }
    }
}

impl fmt::Debug for Pods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pods")
            .field("handlers", &self.handlers)
            .finish_non_exhaustive()
    }
}

impl Collector for Pods {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        overhead::encode(&self.overheads.all(), &mut encoder)?;
        let help = "Writes of records of pods and containers to disk.";
        let writes = ConstCounter::new(self.pods.record_writes());
        let written =
            encoder.encode_descriptor("record_writes", help, None, MetricType::Counter)?;
        writes.encode(written)?;
        let mut tally = Tally::new(&self.handlers);
        let mut machines = Machines::of(&self.pods);
        for snapshot in self.pods.snapshots() {
            let pod = &snapshot.pod;
            tally.pod(labels::pod_phase(pod), &pod.handler);
            if snapshot.is_ready() {
                machines.pod(&pod.handler, pod.machine_name());
            }
            for container in snapshot.containers.values() {
                tally.container(labels::container_state(container.phase));
            }
        }
        machines.encode(&mut encoder)?;
        tally.encode(encoder)
    }
}

pub(super) struct Tally {
    /// By phase and handler.
    pods: BTreeMap<(&'static str, String), u64>,
    /// By state.
    containers: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// What there is none of is zero; a handler that is configured no more is
    /// there as long as it has pods.
    pub(super) fn new(handlers: &[String]) -> Self {
        let pods = handlers
            .iter()
            .flat_map(|handler| POD_PHASES.map(|phase| ((phase, handler.clone()), 0)));
        Self {
            pods: pods.collect(),
            containers: CONTAINER_STATES.map(|state| (state, 0)).into(),
        }
    }

    pub(super) fn pod(&mut self, phase: &'static str, handler: &str) {
        let count = self.pods.entry((phase, handler.to_owned()));
        *count.or_default() += 1;
    }

    pub(super) fn container(&mut self, state: &'static str) {
        *self.containers.entry(state).or_default() += 1;
    }

    pub(super) fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let pods = self.pods.iter().map(|((phase, handler), count)| {
            ([("phase", *phase), ("handler", handler.as_str())], *count)
        });
        gauges(&mut encoder, "pods", "Pods by the phase they are in.", pods)?;
        let containers = self.containers.iter();
        let containers = containers.map(|(state, count)| ([("state", *state)], *count));
        let help = "Containers by the state they are in.";
        gauges(&mut encoder, "containers", help, containers)
    }
}

pub(super) fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
