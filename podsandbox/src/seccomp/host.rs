//! `RuntimeDefault` on the host's kernel: what a container may call there. What
//! is not named fails with EPERM, calls that Linux will have one day too.
//!
//! The lists are in [`calls`], each with its reason.

mod calls;

use std::collections::HashSet;

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use super::AF_VSOCK;
use crate::Result;

/// The kinds of program that an x86 host runs; those of a kind that is not
/// listed would be killed at their first call.
const ARCHITECTURES: [Arch; 3] = [Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32];

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The CLONE_NEW* flags for mount, cgroup, UTS, IPC, user, PID and network
/// namespaces, among the flags of clone(2). That for time is clone3(2)'s alone.
const NEW_NAMESPACES: u64 =
    0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;

/// What personality(2) may set: Linux, its 32-bit form, each with what uname
/// tells as 2.6; and the question.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// For a container whose processes hold these capabilities.
pub fn host_default(held: &HashSet<Capability>) -> Result<LinuxSeccomp> {
    let granted = calls::BY_CAPABILITY.iter();
    let granted = granted.filter(|(capability, _)| held.contains(capability));
    let lists = calls::EVERYBODYS.iter().copied();
    let lists = lists.chain(granted.map(|(_, names)| *names));
    let names: Vec<&str> = lists.flat_map(str::split_whitespace).collect();
    let mut rules = vec![
        allow(&names, None)?,
        allow(
            &["socket"],
            Some(arg(0, LinuxSeccompOperator::ScmpCmpNe, AF_VSOCK)?),
        )?,
    ];
    for value in PERSONALITIES {
        let is = arg(0, LinuxSeccompOperator::ScmpCmpEq, value)?;
        rules.push(allow(&["personality"], Some(is))?);
    }
    if held.contains(&Capability::SysAdmin) {
        rules.push(allow(&["clone", "clone3"], None)?);
    } else {
        let none = LinuxSeccompArgBuilder::default()
            .index(0_usize)
            .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
            .value(NEW_NAMESPACES)
            .value_two(0_u64)
            .build()?;
        rules.push(allow(&["clone"], Some(none))?);
        // Its flags are in memory, where a filter does not look: programs then
        // use clone.
        let mut refused = rule(&["clone3"], LinuxSeccompAction::ScmpActErrno)?;
        refused.set_errno_ret(Some(ENOSYS));
        rules.push(refused);
    }
    let mut profile = LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .architectures(ARCHITECTURES)
        .syscalls(rules)
        .build()?;
    profile.set_default_errno_ret(Some(EPERM));
    Ok(profile)
}

fn arg(index: usize, op: LinuxSeccompOperator, value: u64) -> Result<LinuxSeccompArg> {
    let arg = LinuxSeccompArgBuilder::default().index(index).op(op);
    Ok(arg.value(value).build()?)
}

fn allow(names: &[&str], arg: Option<LinuxSeccompArg>) -> Result<LinuxSyscall> {
    let mut allowed = rule(names, LinuxSeccompAction::ScmpActAllow)?;
    allowed.set_args(arg.map(|arg| vec![arg]));
    Ok(allowed)
}

fn rule(names: &[&str], action: LinuxSeccompAction) -> Result<LinuxSyscall> {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let rule = LinuxSyscallBuilder::default().names(names);
    Ok(rule.action(action).build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(held: &[Capability]) -> LinuxSeccomp {
        host_default(&held.iter().copied().collect()).unwrap()
    }

    /// The rules for a call, and what they say of its first argument.
    fn rules(profile: &LinuxSeccomp, name: &str) -> Vec<LinuxSyscall> {
        let rules = profile.syscalls().clone().unwrap();
        let of = |rule: &LinuxSyscall| rule.names().iter().any(|known| known == name);
        rules.into_iter().filter(of).collect()
    }

    fn allowed(profile: &LinuxSeccomp, name: &str, first: u64) -> bool {
        rules(profile, name).iter().any(|rule| {
            let fits = |arg: &LinuxSeccompArg| match arg.op() {
                LinuxSeccompOperator::ScmpCmpEq => first == arg.value(),
                LinuxSeccompOperator::ScmpCmpNe => first != arg.value(),
                LinuxSeccompOperator::ScmpCmpMaskedEq => {
                    Some(first & arg.value()) == arg.value_two()
                }
                other => panic!("{other:?}"),
            };
            let args = rule.args().clone().unwrap_or_default();
            rule.action() == LinuxSeccompAction::ScmpActAllow && args.iter().all(fits)
        })
    }

    #[test]
    fn nothing_new_is_made_for_a_container_without_capabilities() {
        let plain = profile(&[]);
        assert_eq!(plain.default_action(), LinuxSeccompAction::ScmpActErrno);
        for name in [
            "mount",
            "unshare",
            "setns",
            "bpf",
            "keyctl",
            "io_uring_setup",
            "userfaultfd",
            "open_by_handle_at",
            "kexec_load",
            "init_module",
            "process_vm_readv",
            "a_call_to_come",
        ] {
            assert!(!allowed(&plain, name, 0), "{name}");
        }
        for name in [
            "read",
            "openat",
            "execve",
            "epoll_wait",
            "futex",
            "landlock_create_ruleset",
        ] {
            assert!(allowed(&plain, name, 0), "{name}");
        }
        const SIGCHLD: u64 = 17;
        assert!(allowed(&plain, "clone", SIGCHLD));
        // pthread_create's.
        assert!(allowed(&plain, "clone", 0x003d_0f00));
        for bit in [
            0x20000_u64,
            1 << 25,
            1 << 26,
            1 << 27,
            1 << 28,
            1 << 29,
            1 << 30,
        ] {
            assert!(!allowed(&plain, "clone", SIGCHLD | bit), "{bit:#x}");
        }
        let refused = rules(&plain, "clone3");
        assert_eq!(refused.len(), 1);
        assert_eq!(refused[0].errno_ret(), Some(ENOSYS));
        assert!(allowed(&plain, "socket", 2) && !allowed(&plain, "socket", AF_VSOCK));
        assert!(allowed(&plain, "personality", 8) && !allowed(&plain, "personality", 0x40000));
    }

    #[test]
    fn a_capability_brings_its_calls() {
        let admin = profile(&[Capability::SysAdmin]);
        for name in ["mount", "unshare", "setns", "clone3"] {
            assert!(allowed(&admin, name, 0), "{name}");
        }
        assert!(allowed(&admin, "clone", NEW_NAMESPACES));
        assert!(!allowed(&admin, "init_module", 0));
        let tracer = profile(&[Capability::SysPtrace]);
        assert!(allowed(&tracer, "process_vm_readv", 0) && !allowed(&tracer, "mount", 0));
    }

    #[test]
    fn programs_of_every_kind_run() {
        let json = serde_json::to_value(profile(&[])).unwrap();
        let kinds = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
        assert_eq!(json["architectures"], serde_json::json!(kinds));
        // What 32-bit programs call instead.
        for name in [
            "mmap2",
            "socketcall",
            "_llseek",
            "fstat64",
            "clock_gettime64",
        ] {
            assert!(allowed(&profile(&[]), name, 0), "{name}");
        }
    }

    #[test]
    fn no_call_is_named_twice() {
        let mut seen = HashSet::new();
        for name in calls::EVERYBODYS.iter().flat_map(|l| l.split_whitespace()) {
            assert!(seen.insert(name), "{name}");
        }
        let granted = calls::BY_CAPABILITY.iter();
        for name in granted.flat_map(|(_, list)| list.split_whitespace()) {
            assert!(!seen.contains(name), "{name} is everybody's");
        }
    }
}
