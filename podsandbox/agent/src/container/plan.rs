//! What a new process does between `clone3` and `execve`, laid out beforehand.
//!
//! The parent makes a [`Plan`] from the OCI spec, with every string already a
//! C string and every mount source already a descriptor, so that
//! [`super::child`] can carry it out without allocating. It also turns a
//! [`Failure`] that the child reports back into a sentence.

use std::ffi::{CStr, CString, c_char};
use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::MsFlags;

use crate::sys::MountAttr;
use crate::userns::UserNamespace;

/// Capability sets as bits (capabilities(7)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rlimit {
    pub resource: u32,
    pub soft: u64,
    pub hard: u64,
}

/// Who a process is and what it may do: the same for a container's first
/// process and for everything run in it later.
#[derive(Clone, Debug)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub capabilities: Capabilities,
    pub no_new_privileges: bool,
    pub seccomp: Option<Arc<SeccompFilter>>,
    pub rlimits: Vec<Rlimit>,
    /// Text for /proc/self/oom_score_adj; none leaves it as inherited.
    pub oom_score_adj: Option<CString>,
    pub cwd: CString,
    pub umask: Option<u32>,
}

#[derive(Debug)]
pub struct SeccompFilter {
    pub program: Vec<libc::sock_filter>,
    pub flags: u64,
}

/// A list of strings as `execve` takes it: pointers, null at the end.
#[derive(Debug)]
pub struct StringArray {
    strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

// SAFETY: the pointers lead into `strings`, which this owns and never changes.
unsafe impl Send for StringArray {}
// SAFETY: as above; there is no interior mutability.
unsafe impl Sync for StringArray {}

impl StringArray {
    pub fn new(strings: Vec<CString>) -> Self {
        let pointers = strings
            .iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect();
        Self { strings, pointers }
    }

    pub fn as_ptr(&self) -> *const *const c_char {
        self.pointers.as_ptr()
    }

    pub fn strings(&self) -> &[CString] {
        &self.strings
    }
}

/// What to run.
#[derive(Debug)]
pub struct Program {
    /// Paths to try in order: one, or one for each directory of PATH.
    pub candidates: Vec<CString>,
    pub argv: StringArray,
    pub envp: Arc<StringArray>,
}

/// One mount of the container, made after the root was entered.
#[derive(Debug)]
pub struct MountStep {
    pub target: CString,
    pub kind: MountKind,
    /// Whether the mount point, where it has to be made, is a directory.
    pub directory: bool,
}

#[derive(Debug)]
pub enum MountKind {
    /// A tree cloned by the parent.
    Tree(OwnedFd),
    New {
        fs: CString,
        source: CString,
        flags: MsFlags,
        data: CString,
        attr: MountAttr,
    },
}

#[derive(Debug)]
pub struct DeviceNode {
    pub path: CString,
    pub mode: u32,
    pub device: libc::dev_t,
    pub uid: u32,
    pub gid: u32,
}

/// How a container's first process makes its file system, mount namespace
/// already its own.
#[derive(Debug)]
pub struct RootSetup {
    /// The root's mount, attached nowhere yet.
    pub tree: OwnedFd,
    pub cgroup_namespace: bool,
    pub mounts: Vec<MountStep>,
    pub devices: Vec<DeviceNode>,
    /// Target and path of symbolic links.
    pub symlinks: Vec<(CString, CString)>,
    /// Path below /proc/sys and value.
    pub sysctls: Vec<(CString, CString)>,
    pub masked: Vec<CString>,
    pub readonly: Vec<CString>,
    pub readonly_root: bool,
}

/// How a process comes to stand in a container.
#[derive(Debug)]
pub enum Entry {
    Create(Box<RootSetup>),
    /// Join the namespaces of the process behind this descriptor.
    Join {
        pidfd: OwnedFd,
        namespaces: i32,
    },
}

#[derive(Debug)]
pub enum Stdio {
    /// Descriptors for standard input, output and error.
    Files([OwnedFd; 3]),
    /// A pseudo terminal of the container's own devpts.
    Terminal {
        rows: u16,
        columns: u16,
        /// Make it /dev/console.
        console: bool,
    },
}

#[derive(Debug)]
pub struct Plan {
    /// The user namespace it is in; none: the guest's.
    pub user: Option<Arc<UserNamespace>>,
    pub entry: Entry,
    pub identity: Identity,
    pub program: Program,
    pub stdio: Stdio,
    /// The child's end of the seqpacket socket to the parent.
    pub channel: OwnedFd,
    /// Say [`Message::Ready`] and wait for one byte before `execve`.
    pub wait: bool,
}

/// Where the child was when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    Session,
    Join,
    CgroupNamespace,
    Propagation,
    Root,
    Mount,
    Device,
    Symlink,
    Terminal,
    Sysctl,
    Mask,
    ReadOnly,
    OomScore,
    Rlimit,
    Cwd,
    Stdio,
    Groups,
    User,
    CapabilityBounds,
    Capabilities,
    NoNewPrivileges,
    Seccomp,
    Wait,
    Exec,
}

const STEPS: [Step; 24] = [
    Step::Session,
    Step::Join,
    Step::CgroupNamespace,
    Step::Propagation,
    Step::Root,
    Step::Mount,
    Step::Device,
    Step::Symlink,
    Step::Terminal,
    Step::Sysctl,
    Step::Mask,
    Step::ReadOnly,
    Step::OomScore,
    Step::Rlimit,
    Step::Cwd,
    Step::Stdio,
    Step::Groups,
    Step::User,
    Step::CapabilityBounds,
    Step::Capabilities,
    Step::NoNewPrivileges,
    Step::Seccomp,
    Step::Wait,
    Step::Exec,
];

/// A step that failed, with the index of its item (which mount, which device).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    pub step: Step,
    pub index: u32,
    pub errno: Errno,
}

/// What the child tells its parent, one packet each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Set up and waiting; the terminal's descriptor comes beside it.
    Ready,
    Failed(Failure),
}

/// Length of an encoded [`Message`].
pub const MESSAGE_LEN: usize = 10;

impl Message {
    pub fn encode(self) -> [u8; MESSAGE_LEN] {
        let mut bytes = [0; MESSAGE_LEN];
        if let Self::Failed(failure) = self {
            bytes[0] = 1;
            bytes[1] = failure.step as u8;
            bytes[2..6].copy_from_slice(&failure.index.to_le_bytes());
            bytes[6..].copy_from_slice(&(failure.errno as i32).to_le_bytes());
        }
        bytes
    }

    /// None for bytes that no child of ours sends.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; MESSAGE_LEN] = bytes.try_into().ok()?;
        match bytes[0] {
            0 => Some(Self::Ready),
            1 => Some(Self::Failed(Failure {
                step: STEPS.get(usize::from(bytes[1])).copied()?,
                index: u32::from_le_bytes([bytes[2], bytes[3], bytes[4], bytes[5]]),
                errno: Errno::from_raw(i32::from_le_bytes([
                    bytes[6], bytes[7], bytes[8], bytes[9],
                ])),
            })),
            _ => None,
        }
    }
}

/// Names of what a plan works on, for words about a failure after the plan
/// itself is gone.
#[derive(Debug, Default)]
pub struct Labels {
    mounts: Vec<String>,
    devices: Vec<String>,
    sysctls: Vec<String>,
    masked: Vec<String>,
    readonly: Vec<String>,
    cwd: String,
    identity: String,
}

impl Labels {
    pub fn of(plan: &Plan) -> Self {
        let text = |s: &CStr| s.to_string_lossy().into_owned();
        let mut labels = Self {
            cwd: text(&plan.identity.cwd),
            identity: format!("uid {} gid {}", plan.identity.uid, plan.identity.gid),
            ..Self::default()
        };
        if let Entry::Create(root) = &plan.entry {
            labels.mounts = root
                .mounts
                .iter()
                .map(|mount| match &mount.kind {
                    MountKind::Tree(_) => format!("a volume at {}", text(&mount.target)),
                    MountKind::New { fs, data, .. } => {
                        let mut label = format!("{} at {}", text(fs), text(&mount.target));
                        if !data.is_empty() {
                            // Writing to a String cannot fail.
                            let _ = write!(label, " ({})", text(data));
                        }
                        label
                    }
                })
                .collect();
            labels.devices = root.devices.iter().map(|d| text(&d.path)).collect();
            labels.sysctls = root.sysctls.iter().map(|(path, _)| text(path)).collect();
            labels.masked = root.masked.iter().map(|p| text(p)).collect();
            labels.readonly = root.readonly.iter().map(|p| text(p)).collect();
        }
        labels
    }

    /// One sentence about a failure before `execve`.
    pub fn describe(&self, failure: Failure) -> String {
        let item = |list: &[String]| {
            list.get(failure.index as usize)
                .cloned()
                .unwrap_or_else(|| "?".to_owned())
        };
        let what = match failure.step {
            Step::Session => "start a session".to_owned(),
            Step::Join => "join the container's namespaces".to_owned(),
            Step::CgroupNamespace => "make a cgroup namespace".to_owned(),
            Step::Propagation => "make the mount namespace private".to_owned(),
            Step::Root => "enter the container's root".to_owned(),
            Step::Mount => format!("mount {}", item(&self.mounts)),
            Step::Device => format!("make the device {}", item(&self.devices)),
            Step::Symlink => "make a symbolic link".to_owned(),
            Step::Terminal => "set up the terminal".to_owned(),
            Step::Sysctl => format!("set the kernel parameter {}", item(&self.sysctls)),
            Step::Mask => format!("mask {}", item(&self.masked)),
            Step::ReadOnly => match self.readonly.get(failure.index as usize) {
                Some(path) => format!("make {path} read-only"),
                None => "make the root read-only".to_owned(),
            },
            Step::OomScore => "set oom_score_adj".to_owned(),
            Step::Rlimit => "set a resource limit".to_owned(),
            Step::Cwd => format!("enter the working directory {}", self.cwd),
            Step::Stdio => "set up standard input and output".to_owned(),
            Step::Groups => "set the supplemental groups".to_owned(),
            Step::User => format!("become {}", self.identity),
            Step::CapabilityBounds => "drop capabilities from the bounding set".to_owned(),
            Step::Capabilities => "set capabilities".to_owned(),
            Step::NoNewPrivileges => "set no_new_privs".to_owned(),
            Step::Seccomp => "install the seccomp filter".to_owned(),
            Step::Wait => "wait for the start".to_owned(),
            Step::Exec => "run the program".to_owned(),
        };
        format!("cannot {what}: {}", failure.errno.desc())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_failure_survives_the_socket(step in 0..STEPS.len(), index: u32, errno in 1..130i32) {
            let message = Message::Failed(Failure { step: STEPS[step], index, errno: Errno::from_raw(errno) });
            prop_assert_eq!(Message::decode(&message.encode()), Some(message));
        }

        #[test]
        fn any_bytes_decode_without_panic(bytes: Vec<u8>) {
            let _ = Message::decode(&bytes);
        }
    }

    #[test]
    fn steps_are_listed_in_the_order_of_their_numbers() {
        for (number, step) in STEPS.iter().enumerate() {
            assert_eq!(*step as usize, number);
        }
    }
}
