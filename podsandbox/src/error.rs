//! Why a pod or container could not be what was asked for.

use std::io;
use std::path::PathBuf;

use crate::cdi::CdiError;
use crate::devices::DeviceError;
use crate::observer::MachineEnd;
use crate::seccomp::ProfileError;
use crate::shell::ShellError;
use crate::spec::HostNamespaces;

/// How a caller should take an [`Error`]; maps one to one onto gRPC codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    InvalidArgument,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    ResourceExhausted,
    DeadlineExceeded,
    Unavailable,
    Unimplemented,
    Internal,
}

/// A step of a pod's start, as named in errors, metrics and the timeline.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    Netns,
    Scratch,
    Cni,
    Vmm,
    Boot,
    Redirect,
    Cgroup,
    Configure,
    Supervisor,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Netns => "netns",
            Self::Scratch => "scratch",
            Self::Cni => "cni",
            Self::Vmm => "vmm",
            Self::Boot => "boot",
            Self::Redirect => "redirect",
            Self::Cgroup => "cgroup",
            Self::Configure => "configure",
            Self::Supervisor => "supervisor",
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("pod sandbox {0:?} not found")]
    PodNotFound(String),
    #[error("container {0:?} not found")]
    ContainerNotFound(String),
    #[error("{kind} id {id:?} is ambiguous: more than one begins with it")]
    Ambiguous { kind: &'static str, id: String },
    #[error("pod sandbox name {name:?} is taken by {id}")]
    PodNameTaken { name: String, id: String },
    #[error("container name {name:?} in pod sandbox {pod} is taken by {id}")]
    ContainerNameTaken {
        name: String,
        pod: String,
        id: String,
    },
    #[error("runtime handler {name:?} is not configured; configured: {known}")]
    UnknownHandler { name: String, known: String },
    #[error(
        "handler {handler:?} refuses pods that share the host's namespaces ({wanted}): \
         name a handler with `oci` in a RuntimeClass, or set runtimes.{handler}.host_namespaces"
    )]
    HostNamespacesRefused {
        handler: String,
        wanted: HostNamespaces,
    },
    #[error(
        "pods of handler {handler:?} that share the host's namespaces ({wanted}) fall to handler \
         {fallback:?}, which is not configured: add it to runtimes with `oci: runc`"
    )]
    NoHostHandler {
        handler: String,
        fallback: String,
        wanted: HostNamespaces,
    },
    #[error(
        "handler {handler:?} needs the OCI runtime {program:?}, which is not there: \
         install the package runc or crun, or set runtimes.{handler}.oci"
    )]
    NoOciRuntime { handler: String, program: PathBuf },
    /// Its pods would get less than they have had.
    #[error("handler {handler:?} gives pods no machine: {why}; what helps: {remedy}")]
    MachineWithheld {
        handler: String,
        why: String,
        remedy: String,
    },
    /// Of `confinement: required`.
    #[error(
        "{lacks}: `confinement: required` starts no pod with less than all; what helps: {remedy}"
    )]
    Unconfined { lacks: String, remedy: String },
    /// Likewise.
    #[error(
        "the node has no limit {path:?} for the pod's control group: `confinement: required` starts \
         no pod with less than all"
    )]
    NoLimit { path: PathBuf },
    #[error("{field}: {what} is not supported in a pod with its own kernel")]
    NotInMicroVm { field: String, what: &'static str },
    #[error(
        "linux.resources.hugepage_limits: the guest's kernel has no huge pages to limit to {bytes} \
         bytes of {size}: nothing reserves any in a pod with its own kernel, so only a limit of 0 can be kept"
    )]
    HugePages { size: String, bytes: u64 },
    #[error("{field}: {what} is not there for a pod on the host's kernel")]
    NotOnHost { field: String, what: &'static str },
    #[error(
        "config.mounts[{container_path}].recursive_read_only: the OCI runtime {program:?} cannot do it, \
         or the host's kernel is older than Linux 5.12"
    )]
    NoRecursiveReadOnly {
        container_path: String,
        program: PathBuf,
    },
    #[error("the host's kernel has no EROFS, which image layers are: load the module erofs")]
    NoErofs,
    #[error(
        "pod {name} has ended drupe {ends} times by a fault of drupe's own: it is not served until \
         drupe is updated, has run for an hour, or {ledger:?} is removed and drupe started again"
    )]
    EndedDaemon {
        name: String,
        ends: u32,
        ledger: PathBuf,
    },
    #[error("pod sandbox {id} is not ready: {state}")]
    PodNotReady { id: String, state: String },
    #[error("container {id} is {state}, {needed}")]
    ContainerState {
        id: String,
        state: &'static str,
        needed: &'static str,
    },
    #[error(
        "pod sandbox {id} cannot have {wanted_mib} MiB of memory: its machine was started with {machine_mib} MiB (memory_headroom_mib of the runtime handler is how much a pod can grow by)"
    )]
    MachineTooSmall {
        id: String,
        wanted_mib: u32,
        machine_mib: u32,
    },
    #[error("{field}: {why}")]
    Invalid { field: String, why: String },
    #[error("pod sandbox {id} failed in phase {step}: {}{console}", sentence(source.as_ref()))]
    Start {
        id: String,
        step: Step,
        source: Box<Error>,
        /// The last lines of the guest's console, where they may help.
        console: String,
    },
    #[error(
        "pod sandbox {id} has no free disk slot: it has {slots} (disk_slots of the runtime), \
         {taken} of them taken, and the container needs {needed}, one for its image and one for each \
         image volume and each block device that no other container of the pod has"
    )]
    NoDiskSlot {
        id: String,
        slots: u32,
        taken: usize,
        needed: usize,
    },
    #[error(
        "pod sandbox {id} has {max} images of containers and image volumes at most, \
         {taken} of them taken, and the container needs {needed}"
    )]
    TooManyImages {
        id: String,
        max: u32,
        taken: usize,
        needed: usize,
    },
    /// In the words that the kubelet looks for.
    #[error("ImageVolumeMountFailed: config.mounts[{container_path}].image")]
    ImageVolume {
        container_path: String,
        source: Box<imagesvc::Error>,
    },
    /// Likewise.
    #[error("ImageVolumeMountFailed: {container_path}: image_sub_path {sub_path:?}")]
    ImageSubPath {
        container_path: String,
        sub_path: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Cdi(#[from] CdiError),
    #[error(transparent)]
    Shell(#[from] ShellError),
    #[error("mount source {path:?}")]
    MountSource {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("seccomp profile {path:?}")]
    SeccompProfile {
        path: PathBuf,
        #[source]
        source: ProfileError,
    },
    #[error("seccomp profile {path:?} could not be read within {seconds} s")]
    SeccompProfileTimeout { path: PathBuf, seconds: u64 },
    #[error("log file {path:?}")]
    LogFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{what} {path:?}")]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// In words, with its path.
    #[error("the guest kernel cannot be used: {0}")]
    GuestKernel(String),
    #[error("cannot open /dev/kvm (`drupe check` tells what helps)")]
    Kvm(#[source] io::Error),
    #[error("{program} failed: {stderr}")]
    Tool {
        program: &'static str,
        stderr: String,
    },
    #[error("the guest did not report ready within {seconds} s{console}")]
    BootTimeout { seconds: u64, console: String },
    #[error("the virtual machine ended: {}", on_one_line(.0))]
    VmEnded(String),
    /// Before its agent had reported ready.
    #[error("the virtual machine ended: {}", on_one_line(report))]
    BootEnded { end: MachineEnd, report: String },
    #[error("the pod's supervisor ended: {0}")]
    SupervisorEnded(String),
    #[error("the pod is being stopped")]
    Stopping,
    #[error("the agent refused {call}: {message}")]
    Agent {
        call: &'static str,
        code: tonic::Code,
        message: String,
    },
    #[error("the connection to the agent broke during {call}: {message}")]
    AgentLink { call: &'static str, message: String },
    #[error("a stream of the guest")]
    Stream {
        #[source]
        source: io::Error,
    },
    #[error("the agent broke the protocol of {call}: {why}")]
    Protocol {
        call: &'static str,
        why: &'static str,
    },
    #[error("cannot reach port {port} of pod sandbox {pod}: {why}")]
    Forward { pod: String, port: u16, why: String },
    #[error(transparent)]
    Dial(#[from] vmm_client::DialError),
    #[error("mounting the volumes of container {container:?} took longer than {seconds} s")]
    MountTimeout { container: String, seconds: u64 },
    #[error("the agent did not answer {call} within {seconds} s")]
    AgentTimeout { call: &'static str, seconds: u64 },
    #[error("container {id} did not end within {seconds} s of SIGKILL")]
    Unkillable { id: String, seconds: u64 },
    #[error(transparent)]
    Image(#[from] imagesvc::Error),
    #[error("the network is not ready: {0}")]
    NoNetwork(String),
    #[error(transparent)]
    Cni(#[from] netns::cni::CniError),
    #[error(transparent)]
    Netns(#[from] netns::NetnsError),
    #[error(
        "the pod cannot be held to its addresses, and its namespace {namespace:?} is not among \
         those that need not be (network.source_check_exempt)"
    )]
    NoSourceCheck {
        namespace: String,
        source: netns::NetnsError,
    },
    #[error(transparent)]
    Spawn(#[from] vmm_client::SpawnError),
    #[error(transparent)]
    Control(#[from] vmm_client::ControlError),
    #[error("state database")]
    Store(#[from] crate::store::StoreError),
    #[error("oci runtime spec")]
    Oci(#[from] oci_spec::OciSpecError),
    /// The outcome of a start that several requests waited for.
    #[error("{message}")]
    Shared { kind: ErrorKind, message: String },
}

impl Error {
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::PodNotFound(_) | Self::ContainerNotFound(_) => ErrorKind::NotFound,
            Self::PodNameTaken { .. } | Self::ContainerNameTaken { .. } => ErrorKind::AlreadyExists,
            Self::UnknownHandler { .. }
            | Self::Ambiguous { .. }
            | Self::Invalid { .. }
            | Self::Oci(_) => ErrorKind::InvalidArgument,
            Self::PodNotReady { .. }
            | Self::EndedDaemon { .. }
            | Self::ContainerState { .. }
            | Self::MachineTooSmall { .. }
            | Self::HugePages { .. }
            | Self::Kvm(_)
            | Self::HostNamespacesRefused { .. }
            | Self::NoHostHandler { .. }
            | Self::NoOciRuntime { .. }
            | Self::MachineWithheld { .. }
            | Self::Unconfined { .. }
            | Self::NoLimit { .. }
            | Self::Spawn(vmm_client::SpawnError::Unconfined { .. })
            | Self::NotOnHost { .. }
            | Self::NoRecursiveReadOnly { .. }
            | Self::NoSourceCheck { .. }
            | Self::NoErofs => ErrorKind::FailedPrecondition,
            Self::NotInMicroVm { .. } => ErrorKind::Unimplemented,
            Self::Start { source, .. } => source.kind(),
            Self::NoDiskSlot { .. } | Self::TooManyImages { .. } => ErrorKind::ResourceExhausted,
            Self::NoNetwork(_) => ErrorKind::Unavailable,
            Self::Device(error) => error.kind(),
            Self::Cdi(error) => error.kind(),
            Self::Shell(error) => error.kind(),
            Self::MountSource { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::NotADirectory
                        | io::ErrorKind::InvalidInput
                ) =>
            {
                ErrorKind::InvalidArgument
            }
            Self::LogFile { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                ErrorKind::InvalidArgument
            }
            Self::LogFile { source, .. } if source.kind() == io::ErrorKind::InvalidInput => {
                ErrorKind::FailedPrecondition
            }
            Self::ImageSubPath { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::InvalidArgument,
            },
            Self::SeccompProfile { source, .. } => match source {
                ProfileError::Read(error) if error.kind() == io::ErrorKind::NotFound => {
                    ErrorKind::NotFound
                }
                ProfileError::Read(_) => ErrorKind::Internal,
                _ => ErrorKind::InvalidArgument,
            },
            Self::MountSource { source, .. }
            | Self::LogFile { source, .. }
            | Self::File { source, .. }
                if source.kind() == io::ErrorKind::StorageFull =>
            {
                ErrorKind::ResourceExhausted
            }
            Self::AgentLink { .. } | Self::Stream { .. } | Self::Forward { .. } | Self::Dial(_) => {
                ErrorKind::Unavailable
            }
            Self::BootTimeout { .. }
            | Self::MountTimeout { .. }
            | Self::SeccompProfileTimeout { .. }
            | Self::AgentTimeout { .. }
            | Self::Unkillable { .. } => ErrorKind::DeadlineExceeded,
            Self::Stopping => ErrorKind::FailedPrecondition,
            Self::Cni(netns::cni::CniError::Invalid { .. }) => ErrorKind::InvalidArgument,
            Self::Cni(error) if error.timed_out() => ErrorKind::DeadlineExceeded,
            Self::Store(error) if error.is_full() => ErrorKind::ResourceExhausted,
            Self::Agent { code, .. } => match code {
                tonic::Code::InvalidArgument => ErrorKind::InvalidArgument,
                tonic::Code::NotFound => ErrorKind::NotFound,
                tonic::Code::FailedPrecondition => ErrorKind::FailedPrecondition,
                tonic::Code::AlreadyExists => ErrorKind::AlreadyExists,
                tonic::Code::ResourceExhausted => ErrorKind::ResourceExhausted,
                tonic::Code::DeadlineExceeded => ErrorKind::DeadlineExceeded,
                tonic::Code::Unavailable => ErrorKind::Unavailable,
                _ => ErrorKind::Internal,
            },
            Self::Image(error) => image_kind(error),
            Self::ImageVolume { source, .. } => image_kind(source),
            Self::Shared { kind, .. } => *kind,
            _ => ErrorKind::Internal,
        }
    }

    /// The error and its causes in one sentence.
    #[must_use]
    pub fn sentence(&self) -> String {
        sentence(self)
    }
}

fn image_kind(error: &imagesvc::Error) -> ErrorKind {
    match error.kind() {
        imagesvc::ErrorKind::NotFound => ErrorKind::NotFound,
        imagesvc::ErrorKind::InvalidArgument => ErrorKind::InvalidArgument,
        imagesvc::ErrorKind::ResourceExhausted => ErrorKind::ResourceExhausted,
        imagesvc::ErrorKind::Unconfined | imagesvc::ErrorKind::Unsupported => {
            ErrorKind::FailedPrecondition
        }
        _ => ErrorKind::Internal,
    }
}

/// A VMM's report with the lines of the guest's console behind one another, as
/// logs and clients take it.
fn on_one_line(report: &str) -> String {
    /// Some lines of the console.
    const MAX_CHARS: usize = 4096;
    let lines = report.lines().map(str::trim);
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
    vmm_client::plain_within(&lines.join(" | ").replace(": | ", ": "), MAX_CHARS)
}

/// An error and its causes in one sentence, each said once.
#[must_use]
pub fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

pub type Result<T> = std::result::Result<T, Error>;
