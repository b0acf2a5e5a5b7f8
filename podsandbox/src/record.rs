//! What is on disk about a pod and its containers.
//!
//! A record is written before the step it announces is taken. A daemon that
//! finds a pod [`PodPhase::Reserved`] or [`PodPhase::Starting`] undoes it; every
//! resource's name follows from the id, so the id is enough.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmm_client::Machine;

use crate::devices::DeviceSlot;
use crate::error::Step;
pub use crate::phase::PodPhase;
use crate::spec::{ContainerSpec, PodSpec};
use crate::volumes::Bind;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodRecord {
    pub id: String,
    pub spec: PodSpec,
    /// The configured handler that serves it.
    pub handler: String,
    #[serde(default)]
    pub kind: PodKind,
    /// What its kernel runs on; none on the host's kernel, and in a record of
    /// a version that did not say.
    #[serde(default)]
    pub machine: Option<Machine>,
    pub phase: PodPhase,
    pub created_at_nanos: i64,
    /// Uid and gid of the pod's VMM, where it has one.
    pub uid: u32,
    pub vcpus: u32,
    /// What the guest is to have now; 0 where there is none.
    pub memory_mib: u32,
    /// What its machine was started with: it cannot have more. 0 in a record
    /// of a version that knew no difference.
    #[serde(default)]
    pub machine_mib: u32,
    /// The control group the VMM is put below; none: the daemon's own.
    pub cgroup: Option<PathBuf>,
    pub network: Option<PodNetworkRecord>,
    /// Process id of the VMM, or of the supervisor, on the host.
    pub vmm_pid: Option<u32>,
    /// Why the pod is not ready any more, when nobody asked for that.
    pub failure: Option<String>,
    pub timeline: Vec<PhaseTime>,
}

impl PodRecord {
    #[must_use]
    pub fn machine_mib(&self) -> u32 {
        self.machine_mib.max(self.memory_mib)
    }

    /// What its kernel runs on, in one word for people, labels and programs.
    #[must_use]
    pub fn machine_name(&self) -> &'static str {
        match (self.kind, self.machine) {
            (PodKind::Host, _) => HOST,
            (PodKind::MicroVm, Some(machine)) => machine_name(machine),
            (PodKind::MicroVm, None) => "unknown",
        }
    }

    /// What the guest is to do without.
    #[must_use]
    pub fn balloon_mib(&self) -> u32 {
        self.machine_mib() - self.memory_mib
    }
}

/// The machine of pods that have none: the node's kernel is theirs.
pub const HOST: &str = "host";

/// As the configuration spells it.
#[must_use]
pub fn machine_name(machine: Machine) -> &'static str {
    match machine {
        Machine::Kvm => "kvm",
        Machine::Uml(_) => "uml",
    }
}

/// What a pod's containers run on. It does not change with the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PodKind {
    /// A kernel of the pod's own.
    #[default]
    MicroVm,
    /// The host's kernel, by an OCI runtime.
    Host,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetworkRecord {
    /// In the order the CNI result gives them; the first is the pod's IP.
    pub ips: Vec<String>,
}

/// One step of a pod's start, in microseconds since RunPodSandbox came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    pub phase: Step,
    pub start_us: u64,
    pub duration_us: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContainerPhase {
    /// Being put together; a daemon that finds it so undoes it.
    Creating,
    Created,
    Running,
    Exited,
    /// RemoveContainer has begun.
    Removing,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerRecord {
    pub id: String,
    pub pod_id: String,
    pub spec: ContainerSpec,
    pub image_id: String,
    /// The image by digest, as the kubelet shows it; else the id.
    pub image_ref: String,
    /// The image as people name it.
    pub image_name: String,
    pub phase: ContainerPhase,
    /// The disk slot its image is attached to, until it has ended; on the
    /// host's kernel only a number for as long as its root is mounted.
    pub slot: Option<u32>,
    /// Those of its image volumes, likewise.
    #[serde(default)]
    pub volume_slots: Vec<u32>,
    /// Those of the node's block devices that it has, likewise; containers with
    /// the same device have the same slot.
    #[serde(default)]
    pub device_slots: Vec<DeviceSlot>,
    /// What StopContainer sends first: asked for, or the image's.
    pub stop_signal: String,
    pub log_file: Option<PathBuf>,
    pub created_at_nanos: i64,
    pub started_at_nanos: i64,
    pub exit: Option<ExitRecord>,
    /// The process in the guest's PID namespace.
    pub pid: u32,
    pub user: Option<ResolvedUser>,
    /// What each of its mounts is bound from; others of the pod's containers
    /// may have the same. Freed with the last record that has it. None on the
    /// host's kernel, where mounts are the node's own paths.
    #[serde(default)]
    pub binds: Vec<Bind>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedUser {
    pub uid: u32,
    pub gid: u32,
    pub supplemental_groups: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub code: i32,
    pub finished_at_nanos: i64,
    pub reason: ExitReason,
    pub message: String,
    /// Its end was not seen: it is being removed, and must have ended by then.
    #[serde(default)]
    pub presumed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    Completed,
    Error,
    OOMKilled,
    StartError,
    /// The pod's machine is gone and with it what its containers returned.
    Unknown,
}

impl ExitReason {
    /// The reason that belongs to an exit the agent reported.
    #[must_use]
    pub fn of(code: i32, oom_killed: bool, start_error: &str) -> Self {
        match (code, oom_killed, start_error.is_empty()) {
            (_, _, false) => Self::StartError,
            (_, true, _) => Self::OOMKilled,
            (0, ..) => Self::Completed,
            _ => Self::Error,
        }
    }

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Error => "Error",
            Self::OOMKilled => "OOMKilled",
            Self::StartError => "StartError",
            Self::Unknown => "Unknown",
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{oci, spec};

    /// A pod that serves, of no kubelet's group.
    pub(crate) fn pod(id: &str, name: &str) -> PodRecord {
        let mut spec = spec::tests::pod();
        spec.name.name = name.to_owned();
        PodRecord {
            id: id.to_owned(),
            spec,
            handler: "microvm".to_owned(),
            kind: PodKind::MicroVm,
            machine: None,
            phase: PodPhase::Ready,
            created_at_nanos: 1,
            uid: 1,
            vcpus: 1,
            memory_mib: 512,
            machine_mib: 512,
            cgroup: None,
            network: None,
            vmm_pid: None,
            failure: None,
            timeline: Vec::new(),
        }
    }

    pub(crate) fn container(id: &str, pod: &str, phase: ContainerPhase) -> ContainerRecord {
        ContainerRecord {
            id: id.to_owned(),
            pod_id: pod.to_owned(),
            spec: oci::tests::container(),
            image_id: "sha256:x".to_owned(),
            image_ref: "sha256:x".to_owned(),
            image_name: "busybox".to_owned(),
            phase,
            slot: None,
            volume_slots: Vec::new(),
            device_slots: Vec::new(),
            stop_signal: "SIGTERM".to_owned(),
            log_file: None,
            created_at_nanos: 1,
            started_at_nanos: 0,
            exit: None,
            pid: 0,
            user: None,
            binds: Vec::new(),
        }
    }
}
