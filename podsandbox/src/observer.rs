//! What happens to pods, told to whoever counts it.
//!
//! Drivers and clients of agents tell an [`Observer`] of what has happened,
//! once, and ask nothing back. What is so now is in snapshots
//! ([`crate::PodManager::snapshots`]).

use std::fmt::Debug;
use std::time::{Duration, SystemTime};

use vmm_client::protocol::EndCause;

use crate::error::{Error, Step};
use crate::record::PodRecord;

/// Called from the tasks that serve pods: it must not wait.
pub trait Observer: Debug + Send + Sync + 'static {
    /// A pod serves, `took` after RunPodSandbox came in. Each step comes once;
    /// some run side by side.
    fn pod_started(&self, handler: &str, steps: &[(Step, Duration)], took: Duration);

    fn pod_not_started(&self, handler: &str, why: NotStarted);

    /// A start is over and whoever waited for it was answered.
    fn start_over(&self, _: &StartOver<'_>) {}

    /// The machine of a pod is over, or the supervisor of one on the host's
    /// kernel.
    fn machine_ended(&self, end: MachineEnd);

    /// An agent answered a call with `code`, or did not answer.
    fn agent_failed(&self, code: tonic::Code);
}

/// Nobody counts.
impl Observer for () {
    fn pod_started(&self, _: &str, _: &[(Step, Duration)], _: Duration) {}
    fn pod_not_started(&self, _: &str, _: NotStarted) {}
    fn machine_ended(&self, _: MachineEnd) {}
    fn agent_failed(&self, _: tonic::Code) {}
}

/// All there is to tell of a pod's start, for who traces it.
#[derive(Debug)]
pub struct StartOver<'a> {
    /// With the timeline, which counts from `began`.
    pub record: &'a PodRecord,
    /// The machine of its handler; none: the host's kernel.
    pub machine: Option<vmm_client::Machine>,
    /// The request's that began it; others may have joined.
    pub parent: Option<&'a TraceParent>,
    pub began: SystemTime,
    pub took: Duration,
    pub failure: Option<StartFailure<'a>>,
}

/// Why a start failed or was stopped.
#[derive(Clone, Copy, Debug)]
pub struct StartFailure<'a> {
    pub why: NotStarted,
    /// What failed by itself, rather than with what ran beside it.
    pub step: Option<Step>,
    pub error: &'a Error,
    /// Since `began`; from then on the start was undone.
    pub undone_from: Duration,
}

/// The caller's place in a trace, as W3C Trace Context writes it. It is handed
/// on, not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceParent {
    pub traceparent: String,
    pub tracestate: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotStarted {
    Failed,
    /// StopPodSandbox or RemovePodSandbox came before the end of the start.
    Stopped,
}

/// How a machine came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineEnd {
    /// With its pod, as asked.
    Stopped,
    /// With the start of its pod, which failed.
    StartFailed,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest switched itself off.
    PoweredOff,
    /// From outside: by a signal, or by a request that was not drupe's.
    Killed,
    /// The machine or one of its devices failed.
    Fault,
    /// Its VMM or supervisor went without a word, or cannot be reached.
    MonitorLost,
    /// Its VMM, of another version, does not say.
    Unknown,
}

impl MachineEnd {
    pub const ALL: [Self; 8] = [
        Self::Stopped,
        Self::StartFailed,
        Self::GuestPanic,
        Self::PoweredOff,
        Self::Killed,
        Self::Fault,
        Self::MonitorLost,
        Self::Unknown,
    ];
}

impl From<EndCause> for MachineEnd {
    fn from(cause: EndCause) -> Self {
        match cause {
            EndCause::Killed => Self::Killed,
            EndCause::GuestPanic => Self::GuestPanic,
            EndCause::PoweredOff => Self::PoweredOff,
            EndCause::Fault => Self::Fault,
            EndCause::Unknown => Self::Unknown,
        }
    }
}
