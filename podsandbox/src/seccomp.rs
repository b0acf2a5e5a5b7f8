//! Seccomp profiles: `RuntimeDefault` here, the node's own in [`localhost`].
//!
//! In a microVM a container's kernel is its pod's own, so a profile guards the
//! pod's other containers and the guest's kernel, not the host. `RuntimeDefault`
//! there refuses what the field's default profiles refuse, each group unless the
//! container holds the capability that the calls are for. On the host's kernel
//! it is a list of what is allowed ([`host`]).

mod host;
mod localhost;

use std::collections::HashSet;

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder,
    LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscallBuilder,
};

pub use host::host_default;
pub use localhost::{Profile, ProfileError};

use crate::Result;

/// Calls refused in a guest to a container without the capability; None: to every one.
const REFUSED: [(Option<Capability>, &[&str]); 9] = [
    (
        None,
        &[
            "add_key",
            "keyctl",
            "request_key",
            "io_uring_enter",
            "io_uring_register",
            "io_uring_setup",
            "userfaultfd",
            "uselib",
            "ustat",
            "sysfs",
            "vserver",
            "nfsservctl",
            "get_kernel_syms",
            "query_module",
            "create_module",
            "vm86",
            "vm86old",
        ],
    ),
    (
        Some(Capability::SysAdmin),
        &[
            "mount",
            "umount",
            "umount2",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "pivot_root",
            "setns",
            "unshare",
            "sethostname",
            "setdomainname",
            "quotactl",
            "quotactl_fd",
            "swapon",
            "swapoff",
            "lookup_dcookie",
        ],
    ),
    (Some(Capability::Bpf), &["bpf"]),
    (Some(Capability::Perfmon), &["perf_event_open"]),
    (
        Some(Capability::SysBoot),
        &["reboot", "kexec_load", "kexec_file_load"],
    ),
    (
        Some(Capability::SysModule),
        &["init_module", "finit_module", "delete_module"],
    ),
    (
        Some(Capability::SysTime),
        &[
            "settimeofday",
            "stime",
            "clock_settime",
            "clock_settime64",
            "adjtimex",
            "clock_adjtime",
        ],
    ),
    (Some(Capability::DacReadSearch), &["open_by_handle_at"]),
    (Some(Capability::SysRawio), &["iopl", "ioperm"]),
];

/// `EPERM`, as the field's default profiles answer.
const EPERM: u32 = 1;

/// Reaches the hypervisor, and what is at its ports, past the network's rules:
/// in a guest the monitor and the agent, which no container has to do with.
const AF_VSOCK: u64 = 40;

/// Of a container in a microVM.
pub fn runtime_default(held: &HashSet<Capability>) -> Result<LinuxSeccomp> {
    let names: Vec<String> = REFUSED
        .iter()
        .filter(|(capability, _)| capability.is_none_or(|needed| !held.contains(&needed)))
        .flat_map(|(_, names)| names.iter().map(|&name| name.to_owned()))
        .collect();
    let refuse = LinuxSyscallBuilder::default()
        .names(names)
        .action(LinuxSeccompAction::ScmpActErrno)
        .errno_ret(EPERM)
        .build()?;
    let family = LinuxSeccompArgBuilder::default()
        .index(0_usize)
        .op(LinuxSeccompOperator::ScmpCmpEq)
        .value(AF_VSOCK)
        .build()?;
    let vsock = LinuxSyscallBuilder::default()
        .names(vec!["socket".to_owned()])
        .action(LinuxSeccompAction::ScmpActErrno)
        .errno_ret(EPERM)
        .args(vec![family])
        .build()?;
    Ok(LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActAllow)
        .architectures(vec![Arch::ScmpArchX86_64])
        .syscalls(vec![refuse, vsock])
        .build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_brings_its_calls_back() {
        let refused = |held: &HashSet<Capability>| {
            let profile = runtime_default(held).unwrap();
            profile
                .syscalls()
                .clone()
                .unwrap()
                .iter()
                .flat_map(|s| s.names().clone())
                .collect::<HashSet<_>>()
        };
        let none = refused(&HashSet::new());
        assert!(none.contains("mount") && none.contains("keyctl") && none.contains("bpf"));
        let admin = refused(&HashSet::from([Capability::SysAdmin]));
        assert!(!admin.contains("mount") && admin.contains("keyctl") && admin.contains("bpf"));
    }

    #[test]
    fn sockets_to_the_monitor_are_refused_and_no_others() {
        let profile = runtime_default(&HashSet::from([Capability::SysAdmin])).unwrap();
        let rules = profile.syscalls().clone().unwrap();
        let of_sockets: Vec<_> = rules
            .iter()
            .filter(|rule| rule.names().iter().any(|name| name == "socket"))
            .collect();
        let [rule] = of_sockets[..] else {
            panic!("{of_sockets:?}");
        };
        assert_eq!(rule.names().len(), 1);
        assert_eq!(rule.action(), LinuxSeccompAction::ScmpActErrno);
        let args = rule.args().clone().unwrap();
        assert_eq!((args[0].index(), args[0].value()), (0, AF_VSOCK));
        assert_eq!(args[0].op(), LinuxSeccompOperator::ScmpCmpEq);
    }
}
