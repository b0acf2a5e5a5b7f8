//! What a pod's VMM is told when it starts.
//!
//! The daemon spawns `drupe-vmm` with one end of a unix socket pair as its
//! standard input and sends one message: a [`VmSpec`] as JSON, its file
//! descriptors beside it by `SCM_RIGHTS`, in the order of [`VmSpec::fds`]. The
//! VMM opens no path of the host: whatever it uses is in that list.

use std::fmt;
use std::num::NonZeroU64;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Confinement;

/// The virtual machine to run. File descriptors travel beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The pod sandbox's id: only for logs and process titles.
    pub pod_id: String,
    pub machine: Machine,
    /// 1 to 32. `uml` in ptrace mode takes 1.
    pub vcpus: u32,
    pub memory_mib: u32,
    /// How much of it the guest is to do without from its start: it takes that
    /// out of use by itself, soon after its drivers come up.
    #[serde(default)]
    pub balloon_mib: u32,
    /// What backs the guest's memory on `kvm`.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Words added to the guest kernel's command line.
    pub kernel_args: Vec<String>,
    /// Whether a guest kernel of `uml` may run that keeps the node's system
    /// calls of its start, instead of ending when its agent reports ready.
    #[serde(default)]
    pub unsealed: bool,
    /// What becomes of the pod where the node lacks a part of its confinement.
    #[serde(default)]
    pub confinement: Confinement,
    /// Whether no one else runs on the hyperthreads of a core while the pod runs
    /// on one of them.
    #[serde(default)]
    pub core_scheduling: bool,
    /// The guest NIC's address; absent in a pod without a network.
    pub mac: Option<[u8; 6]>,
    /// The network MTU to announce (virtio 1.2 §5.1.4).
    pub mtu: Option<u16>,
    /// Disk slots that exist from boot beside the scratch disk; a container's
    /// image is attached to one.
    pub image_slots: u32,
    /// Holds for each disk alone.
    #[serde(default)]
    pub disk_limit: RateLimit,
    /// Where the jail's root tmpfs is mounted: an empty directory.
    pub jail_root: PathBuf,
    /// The directory whose mounts the guest sees through virtio-fs. The jail's
    /// mount namespace is a slave of the daemon's, so a later bind mount
    /// inside it appears.
    pub shared_dir: PathBuf,
    /// How the guest sees the owners of what is in it; absent: as they are.
    #[serde(default)]
    pub shared_ids: Option<IdRange>,
    /// Uid and gid of the VMM and of everything it starts.
    pub uid: u32,
    pub gid: u32,
    /// The console log is cut to its second half beyond this size.
    pub console_limit_bytes: u64,
    /// One role for each descriptor sent with this message, in order.
    pub fds: Vec<FdRole>,
}

/// Users and groups 0 to `length - 1` of the host are `guest` and on in the
/// guest. Others of the host have no id there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdRange {
    pub guest: u32,
    pub length: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    Uml(UmlMode),
    Kvm,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Uml(UmlMode::Ptrace) => "uml, mode ptrace",
            Self::Uml(UmlMode::Seccomp) => "uml, mode seccomp",
        })
    }
}

/// How User Mode Linux confines the processes of its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UmlMode {
    /// Keeps a container's process out of the guest kernel; one CPU.
    Ptrace,
    /// Faster, with SMP; its stub is no boundary inside the pod.
    Seccomp,
}

/// Pages of the host under the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// As the host is set up (`transparent_hugepage/enabled`).
    #[default]
    Off,
    /// Huge where the host has them: faster, and memory that a guest has
    /// touched goes back in larger pieces only.
    Transparent,
    /// 2 MiB pages that the node has set aside (`vm.nr_hugepages`).
    Reserved,
}

/// What a disk may move; nothing stated is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    pub bytes_per_second: Option<NonZeroU64>,
    pub requests_per_second: Option<NonZeroU64>,
}

/// What a descriptor that came with the [`VmSpec`] is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FdRole {
    /// The guest kernel, read-only.
    Kernel,
    /// The initramfs, read-only.
    Initramfs,
    /// The tap beside CNI's interface (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR);
    /// once for each of its queues, if they are several (IFF_MULTI_QUEUE).
    Tap,
    /// A control group (v2) in which the pod's processes are, or will be, and
    /// in which no device is to be opened; any number of them.
    ControlGroup,
    /// The console log, opened for append and read.
    ConsoleLog,
    /// Listening SOCK_SEQPACKET socket of the control protocol.
    ControlListener,
    /// Listening SOCK_STREAM socket through which vsock ports are dialled.
    VsockListener,
    /// The pod's scratch disk, read-write.
    Scratch,
    /// /dev/kvm, for [`Machine::Kvm`] alone.
    Kvm,
}
