//! What the operator decides about pods. The daemon's YAML embeds these.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmm_client::{HugePages, RateLimit, UmlMode};

use crate::machine::Decision;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RuntimeConfig {
    pub machine: MachineChoice,
    /// How `uml` confines the guest's processes.
    pub uml_mode: UmlMode,
    /// `{machine}` in it stands for `kvm` or `uml`.
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// Words added to the guest kernel's command line.
    pub kernel_args: Vec<String>,
    /// Guest memory of a pod that states no limit.
    pub default_memory_mib: u32,
    /// vCPUs of a pod that states no limit.
    pub default_vcpus: u32,
    /// Pages of the node under a `kvm` guest's memory.
    pub huge_pages: HugePages,
    /// Guest memory on top of the pod's limit where RuntimeClass declares no
    /// overhead: the guest's kernel and the agent live there.
    pub guest_overhead_mib: u32,
    /// How much memory a pod can grow by while it runs. The guest does without
    /// it until then, but keeps a 64th of it to manage it by.
    pub memory_headroom_mib: u32,
    /// Size of the disk that holds what containers write.
    pub scratch_gib: u32,
    /// How many image disks, so containers, a pod can hold at once.
    pub disk_slots: u32,
    /// What each disk of a pod may move.
    pub disk_limit: RateLimit,
    /// Queues that a pod's network interface has at most: one for each vCPU.
    pub net_queues: u32,
    /// How long a guest may take to report ready.
    pub boot_timeout_seconds: u64,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            machine: MachineChoice::Auto,
            uml_mode: UmlMode::Seccomp,
            kernel: "/usr/lib/drupe/kernel-{machine}".into(),
            initramfs: "/usr/lib/drupe/initramfs".into(),
            kernel_args: Vec::new(),
            default_memory_mib: 512,
            default_vcpus: 1,
            huge_pages: HugePages::Off,
            guest_overhead_mib: 64,
            memory_headroom_mib: 0,
            scratch_gib: 10,
            disk_slots: 8,
            disk_limit: RateLimit::default(),
            net_queues: 8,
            boot_timeout_seconds: 30,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineChoice {
    Auto,
    Kvm,
    Uml,
}

/// A handler on this node.
#[derive(Clone, Debug, Serialize)]
pub struct Runtime {
    pub settings: RuntimeConfig,
    /// Its machine and its kernel.
    pub decision: Decision,
}

/// Where pods live on this node.
#[derive(Clone, Debug)]
pub struct Config {
    /// Persistent: records and scratch disks.
    pub root: PathBuf,
    /// Volatile: sockets, consoles, shared directories.
    pub run_dir: PathBuf,
    pub netns_dir: PathBuf,
    pub vmm: PathBuf,
    /// First of the 65,536 uids and gids that VMMs run under.
    pub uid_base: u32,
    pub default_runtime: String,
    pub runtimes: BTreeMap<String, Runtime>,
}

impl Config {
    /// The configuration that serves `handler`; empty means the default.
    pub fn runtime(&self, handler: &str) -> crate::Result<(&str, &Runtime)> {
        let name = if handler.is_empty() {
            &self.default_runtime
        } else {
            handler
        };
        self.runtimes
            .get_key_value(name)
            .map(|(k, v)| (k.as_str(), v))
            .ok_or_else(|| crate::Error::UnknownHandler {
                name: name.to_owned(),
                known: self.runtimes.keys().cloned().collect::<Vec<_>>().join(", "),
            })
    }
}
