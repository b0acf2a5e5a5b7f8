//! The values of labels: names that do not change, since dashboards and alerts
//! hold them.

use imagesvc::{ErrorKind, PullOutcome};
use podsandbox::record::{ContainerPhase, PodPhase, PodRecord};
use podsandbox::{MachineEnd, NotStarted, Step};
use tonic::Code;

pub(super) const POD_PHASES: [&str; 7] = [
    "reserved", "starting", "ready", "lost", "stopping", "stopped", "removing",
];

pub(super) fn pod_phase(pod: &PodRecord) -> &'static str {
    match pod.phase {
        PodPhase::Reserved => "reserved",
        PodPhase::Starting => "starting",
        // Its machine ended though nobody asked for that.
        PodPhase::Ready if pod.failure.is_some() => "lost",
        PodPhase::Ready => "ready",
        PodPhase::Stopping => "stopping",
        PodPhase::Stopped => "stopped",
        PodPhase::Removing => "removing",
    }
}

pub(super) const CONTAINER_STATES: [&str; 5] =
    ["creating", "created", "running", "exited", "removing"];

pub(super) fn container_state(phase: ContainerPhase) -> &'static str {
    match phase {
        ContainerPhase::Creating => "creating",
        ContainerPhase::Created => "created",
        ContainerPhase::Running => "running",
        ContainerPhase::Exited => "exited",
        ContainerPhase::Removing => "removing",
    }
}

/// As the timeline of PodSandboxStatus names it.
pub(super) fn step(step: Step) -> &'static str {
    match step {
        Step::Netns => "netns",
        Step::Scratch => "scratch",
        Step::Cni => "cni",
        Step::Vmm => "vmm",
        Step::Boot => "boot",
        Step::Redirect => "redirect",
        Step::Cgroup => "cgroup",
        Step::Configure => "configure",
        Step::Supervisor => "supervisor",
    }
}

pub(super) fn not_started(why: NotStarted) -> &'static str {
    match why {
        NotStarted::Failed => "failed",
        NotStarted::Stopped => "stopped",
    }
}

pub(super) fn machine_end(end: MachineEnd) -> &'static str {
    match end {
        MachineEnd::Stopped => "stopped",
        MachineEnd::StartFailed => "start-failed",
        MachineEnd::GuestPanic => "guest-panic",
        MachineEnd::PoweredOff => "powered-off",
        MachineEnd::Killed => "killed",
        MachineEnd::Fault => "fault",
        MachineEnd::MonitorLost => "monitor-lost",
        MachineEnd::Unknown => "unknown",
    }
}

pub(super) fn pull(outcome: PullOutcome) -> &'static str {
    match outcome {
        PullOutcome::Pulled => "pulled",
        PullOutcome::UpToDate => "up-to-date",
        PullOutcome::Failed(kind) => match kind {
            ErrorKind::InvalidArgument => "invalid-argument",
            ErrorKind::NotFound => "not-found",
            ErrorKind::Unauthorized => "unauthorized",
            ErrorKind::Unavailable => "unavailable",
            ErrorKind::Corrupt => "corrupt",
            ErrorKind::Unsupported => "unsupported",
            ErrorKind::ResourceExhausted => "resource-exhausted",
            ErrorKind::DeadlineExceeded => "deadline-exceeded",
            ErrorKind::Cancelled => "cancelled",
            ErrorKind::Unconfined => "unconfined",
            ErrorKind::Internal => "internal",
        },
    }
}

/// As gRPC's own metrics name it.
pub(super) fn code(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Cancelled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}
