//! drupe's own metrics, for Prometheus to scrape; `docs/metrics.md` lists them.
//!
//! ```text
//! podsandbox ── Observer ──┐
//! imagesvc ──── Observer ──┼─▶ Metrics ──▶ Registry ──▶ GET /metrics (server)
//! CRI requests (requests) ─┘                  ▲
//! PodManager's snapshots, read at a scrape ───┘ (pods)
//! ```
//! What has happened is counted in [`Metrics`], whether or not anybody scrapes;
//! what is so now is read from snapshots. Every label is one of a set that the
//! code or the configuration bounds: no pod, container or image has a series
//! of its own.

mod labels;
mod machines;
mod overhead;
mod pods;
mod requests;
mod server;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use imagesvc::PullOutcome;
use podsandbox::{MachineEnd, NotStarted, PodManager, Step};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use serde::{Deserialize, Serialize};
use tonic::Code;

use crate::overhead::Overheads;
pub use requests::Requests;
pub use server::{MetricsError, Server, listen};

/// A start takes about 0.15 s, its steps from a millisecond on; a network
/// plugin or a boot may take up to its limit of 30 s.
const START_BUCKETS: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0,
];
/// A status takes less than a millisecond, a pull minutes.
const REQUEST_BUCKETS: [f64; 15] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0,
];

/// The phase of a start that is all of it.
const TOTAL: &str = "total";
const STARTED: &str = "started";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// None: nothing listens.
    pub address: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPhase {
    phase: &'static str,
    handler: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStart {
    handler: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRequest {
    method: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfOutcome {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfReason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCode {
    code: &'static str,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// What has happened since the daemon started.
#[derive(Debug)]
pub struct Metrics {
    /// Those of the configuration.
    handlers: Vec<String>,
    start_phases: Histograms<OfPhase>,
    starts: Family<OfStart, Counter>,
    machine_exits: Family<OfReason, Counter>,
    agent_errors: Family<OfCode, Counter>,
    requests: Histograms<OfRequest>,
    pulls: Family<OfOutcome, Counter>,
    pull_bytes: Counter,
}

impl Metrics {
    /// Counters whose labels are known begin at zero, so that the first event
    /// shows as an increase.
    pub fn new<'a>(handlers: impl IntoIterator<Item = &'a String>) -> Self {
        let metrics = Self {
            handlers: handlers.into_iter().cloned().collect(),
            start_phases: Family::new_with_constructor(|| Histogram::new(START_BUCKETS)),
            starts: Family::default(),
            machine_exits: Family::default(),
            agent_errors: Family::default(),
            requests: Family::new_with_constructor(|| Histogram::new(REQUEST_BUCKETS)),
            pulls: Family::default(),
            pull_bytes: Counter::default(),
        };
        for handler in &metrics.handlers {
            metrics.start_phase(handler, TOTAL);
            for outcome in [
                STARTED,
                labels::not_started(NotStarted::Failed),
                labels::not_started(NotStarted::Stopped),
            ] {
                metrics.start(handler, outcome);
            }
        }
        for end in MachineEnd::ALL {
            metrics.machine_exit(end);
        }
        for number in 1..=16 {
            metrics.agent_error(Code::from_i32(number));
        }
        metrics.pull(PullOutcome::Pulled);
        metrics.pull(PullOutcome::UpToDate);
        for kind in imagesvc::ErrorKind::ALL {
            metrics.pull(PullOutcome::Failed(kind));
        }
        metrics
    }

    /// Everything that is scraped.
    pub fn registry(&self, pods: PodManager, overheads: Arc<Overheads>) -> Registry {
        let mut registry = self.counted();
        let pods = pods::Pods::new(pods, overheads, self.handlers.clone());
        registry.register_collector(Box::new(pods));
        registry
    }

    fn counted(&self) -> Registry {
        let mut registry = Registry::with_prefix("drupe");
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "The daemon that runs", Info::new(version));
        registry.register_with_unit(
            "pod_start_phase",
            "Time of each phase of pods' starts that succeeded; total is the whole",
            Unit::Seconds,
            self.start_phases.clone(),
        );
        registry.register(
            "pod_starts",
            "Starts of pods that are over",
            self.starts.clone(),
        );
        registry.register_with_unit(
            "cri_requests",
            "Time until CRI requests were answered",
            Unit::Seconds,
            self.requests.clone(),
        );
        registry.register("image_pulls", "Pulls that are over", self.pulls.clone());
        registry.register_with_unit(
            "image_pull",
            "Bytes of layers that registries sent, compressed as they are there",
            Unit::Bytes,
            self.pull_bytes.clone(),
        );
        registry.register(
            "machine_exits",
            "Ends of pods' virtual machines, and of supervisors of pods on the host's kernel",
            self.machine_exits.clone(),
        );
        registry.register(
            "agent_errors",
            "Calls that agents of pods answered with an error, or did not answer",
            self.agent_errors.clone(),
        );
        registry
    }

    fn start_phase(&self, handler: &str, phase: &'static str) -> Histogram {
        self.start_phases.get_or_create_owned(&OfPhase {
            phase,
            handler: handler.to_owned(),
        })
    }

    fn start(&self, handler: &str, outcome: &'static str) -> Counter {
        self.starts.get_or_create_owned(&OfStart {
            handler: handler.to_owned(),
            outcome,
        })
    }

    fn machine_exit(&self, end: MachineEnd) -> Counter {
        let reason = labels::machine_end(end);
        self.machine_exits.get_or_create_owned(&OfReason { reason })
    }

    fn agent_error(&self, code: Code) -> Counter {
        let code = labels::code(code);
        self.agent_errors.get_or_create_owned(&OfCode { code })
    }

    fn pull(&self, outcome: PullOutcome) -> Counter {
        let outcome = labels::pull(outcome);
        self.pulls.get_or_create_owned(&OfOutcome { outcome })
    }

    fn request(&self, method: &'static str, code: Code, took: Duration) {
        let code = labels::code(code);
        let requests = self.requests.get_or_create(&OfRequest { method, code });
        requests.observe(took.as_secs_f64());
    }
}

impl podsandbox::Observer for Metrics {
    fn pod_started(&self, handler: &str, steps: &[(Step, Duration)], took: Duration) {
        for (step, time) in steps {
            self.start_phase(handler, labels::step(*step))
                .observe(time.as_secs_f64());
        }
        self.start_phase(handler, TOTAL).observe(took.as_secs_f64());
        self.start(handler, STARTED).inc();
    }

    fn pod_not_started(&self, handler: &str, why: NotStarted) {
        self.start(handler, labels::not_started(why)).inc();
    }

    fn machine_ended(&self, end: MachineEnd) {
        self.machine_exit(end).inc();
    }

    fn agent_failed(&self, code: Code) {
        self.agent_error(code).inc();
    }
}

impl imagesvc::Observer for Metrics {
    fn pull_ended(&self, outcome: PullOutcome) {
        self.pull(outcome).inc();
    }

    fn layer_bytes(&self, count: u64) {
        self.pull_bytes.inc_by(count);
    }
}
