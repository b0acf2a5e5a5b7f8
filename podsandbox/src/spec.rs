//! What a pod and a container are asked to be.
//!
//! The CRI server parses requests into these types and rejects what cannot be;
//! past that edge every value here can be acted on. They are stored as they
//! are, so a restarted daemon knows what was asked for.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::devices::Device;

/// The identity the kubelet gives a sandbox; unique on a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodName {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub attempt: u32,
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            namespace,
            uid,
            attempt,
        } = self;
        write!(f, "{namespace}/{name} (uid {uid}, attempt {attempt})")
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PodSpec {
    pub name: PodName,
    /// As asked for; empty means the default handler.
    pub handler: String,
    /// The guest's hostname, at most 64 bytes.
    pub hostname: String,
    /// Where containers' log paths are rooted; none: no logs.
    pub log_directory: Option<PathBuf>,
    /// None: the node's own resolv.conf.
    pub dns: Option<Dns>,
    pub port_mappings: Vec<PortMapping>,
    pub bandwidth: Bandwidth,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Kernel parameters of the guest, by dotted name.
    pub sysctls: BTreeMap<String, String>,
    pub share_process_namespace: bool,
    /// A user namespace for all of the containers; None: the guest's own.
    #[serde(default)]
    pub user_namespace: Option<IdMapping>,
    #[serde(default)]
    pub host_namespaces: HostNamespaces,
    /// The control group that the kubelet made for the pod.
    pub cgroup_parent: Option<PathBuf>,
    /// Sum over the containers, as the kubelet states it; bytes and CPUs.
    pub resources: Resources,
    /// What RuntimeClass declares on top.
    pub overhead: Resources,
}

/// Ids 0 to `length - 1` of containers, users' and groups' alike, are `host_id`
/// and on outside of their user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    pub host_id: u32,
    pub length: u32,
}

/// Which of the node's namespaces are shared instead of the pod's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNamespaces {
    pub network: bool,
    pub ipc: bool,
    pub pid: bool,
}

impl HostNamespaces {
    #[must_use]
    pub fn any(self) -> bool {
        self.network || self.ipc || self.pid
    }
}

impl std::fmt::Display for HostNamespaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = [
            (self.network, "network"),
            (self.ipc, "ipc"),
            (self.pid, "pid"),
        ];
        let names: Vec<&str> = names
            .iter()
            .filter(|(on, _)| *on)
            .map(|(_, n)| *n)
            .collect();
        f.write_str(&names.join(", "))
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host_port: u16,
    /// Empty: every address of the host.
    pub host_ip: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// Bits per second, from the pod's `kubernetes.io/*-bandwidth` annotations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    pub ingress_bits: Option<u64>,
    pub egress_bits: Option<u64>,
}

/// `LinuxContainerResources` of CRI; 0 and None both mean "not set" there, so
/// here only None does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    pub cpu_period_us: Option<u64>,
    /// Microseconds of CPU time per period.
    pub cpu_quota_us: Option<u64>,
    pub cpu_shares: Option<u64>,
    pub memory_limit_bytes: Option<u64>,
    pub memory_swap_limit_bytes: Option<u64>,
    pub oom_score_adj: i32,
    pub cpuset_cpus: String,
    pub cpuset_mems: String,
    /// cgroup v2 files, verbatim.
    pub unified: BTreeMap<String, String>,
    /// Bytes by page size, which is written as in the file's name: `2MB`. The
    /// kubelet limits every size that the node has, to 0 where none is asked.
    #[serde(default)]
    pub hugepage_limits: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContainerName {
    pub name: String,
    pub attempt: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerSpec {
    pub name: ContainerName,
    /// The image as the user wrote it.
    pub user_image: String,
    /// The image id or reference that CRI resolved.
    pub image: String,
    pub command: Vec<String>,
    pub args: Vec<String>,
    pub working_dir: String,
    /// In order; a later one wins.
    pub env: Vec<(String, String)>,
    /// As asked for, and those of its CDI devices.
    pub mounts: Vec<Mount>,
    #[serde(default)]
    pub devices: Vec<Device>,
    /// Names of CDI devices.
    #[serde(default)]
    pub cdi_devices: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Below the pod's log directory; none: output is discarded.
    pub log_path: Option<PathBuf>,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
    /// By Linux's name; None: the image's.
    #[serde(default)]
    pub stop_signal: Option<String>,
    pub user: User,
    /// As asked for; must be the pod's.
    #[serde(default)]
    pub user_namespace: Option<IdMapping>,
    pub security: Security,
    pub resources: Resources,
    /// A place in the guest itself, where commands of the node's operator run as
    /// its root. No request of CRI can ask for one, and none is shown it.
    #[serde(default)]
    pub debug: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Empty for an image.
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    pub read_only: bool,
    /// With everything mounted below it; only with `read_only`, and with
    /// nothing propagated.
    #[serde(default)]
    pub recursive_read_only: bool,
    pub propagation: Propagation,
    /// Whose ids the container sees as files' owners; must be the pod's.
    #[serde(default)]
    pub id_mapping: Option<IdMapping>,
    #[serde(default)]
    pub image: Option<ImageVolume>,
}

/// The files of an image, without anything to write to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageVolume {
    /// An id or reference.
    pub image: String,
    /// A directory inside; empty: the root.
    pub sub_path: String,
}

/// Those of `mounts` that are of the node, in order.
pub(crate) fn node_volumes(mounts: &[Mount]) -> impl Iterator<Item = &Mount> {
    mounts.iter().filter(|mount| mount.image.is_none())
}

/// Those of `mounts` that are images, in order.
pub(crate) fn image_volumes(mounts: &[Mount]) -> impl Iterator<Item = (&Mount, &ImageVolume)> {
    mounts
        .iter()
        .filter_map(|mount| mount.image.as_ref().map(|image| (mount, image)))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Propagation {
    Private,
    HostToContainer,
    Bidirectional,
}

/// Whom the process runs as; names are resolved in the container's own files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub username: String,
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    pub supplemental_groups: Vec<i64>,
    pub strict_groups: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    /// All capabilities and devices of the guest; of the host only in a pod
    /// that shares its kernel.
    pub privileged: bool,
    pub add_capabilities: Vec<String>,
    pub drop_capabilities: Vec<String>,
    /// What a process that is not root's keeps, too.
    #[serde(default)]
    pub ambient_capabilities: Vec<String>,
    pub read_only_root: bool,
    pub no_new_privileges: bool,
    pub masked_paths: Vec<PathBuf>,
    pub readonly_paths: Vec<PathBuf>,
    /// The container's own PID namespace; else the pod's.
    pub own_pid_namespace: bool,
    /// The container whose PID namespace is joined.
    #[serde(default)]
    pub pid_target: Option<String>,
    /// What the request says of the node's namespaces, which are the pod's to
    /// share.
    #[serde(default)]
    pub host_namespaces: HostNamespaces,
    pub seccomp: Seccomp,
}

/// Where a container's processes are seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PidNamespace<'a> {
    Own,
    /// The one that the pod's containers share, or the host's.
    Pods,
    Of(&'a str),
}

impl Security {
    #[must_use]
    pub fn pid_namespace(&self) -> PidNamespace<'_> {
        match &self.pid_target {
            Some(target) => PidNamespace::Of(target),
            None if self.own_pid_namespace => PidNamespace::Own,
            None => PidNamespace::Pods,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    #[default]
    Unconfined,
    RuntimeDefault,
    /// A profile in this file of the node.
    Localhost(PathBuf),
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A pod that asks for nothing.
    pub(crate) fn pod() -> PodSpec {
        PodSpec {
            name: PodName {
                name: "web".into(),
                namespace: "default".into(),
                uid: "u1".into(),
                attempt: 0,
            },
            handler: String::new(),
            hostname: "web".into(),
            log_directory: None,
            dns: None,
            port_mappings: Vec::new(),
            bandwidth: Bandwidth::default(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            sysctls: BTreeMap::new(),
            share_process_namespace: false,
            user_namespace: None,
            host_namespaces: HostNamespaces::default(),
            cgroup_parent: None,
            resources: Resources::default(),
            overhead: Resources::default(),
        }
    }
}
