//! Compiles the seccomp part of an OCI spec (runtime spec 1.2, "Seccomp") to
//! the BPF program that the child installs.
//!
//! Compiled once a container, by the agent, and used again for every exec.
//! Architectures other than the native one are left out: the guest's kernel
//! has no such system calls, and the filter ends a process that tries them.

use std::fs::File;
use std::io::{Read, Seek};

use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

use super::plan::SeccompFilter;

/// `BPF_MAXINSNS`: the kernel takes no longer program.
const MAX_INSTRUCTIONS: usize = 4096;

const INSTRUCTION: usize = size_of::<libc::sock_filter>();

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("seccomp action {action} is not supported")]
    Action { action: LinuxSeccompAction },
    #[error("seccomp flag {flag} is not supported")]
    Flag { flag: LinuxSeccompFilterFlag },
    #[error("seccomp argument index {index} of {syscall} is not 0 to 5")]
    Argument { syscall: String, index: usize },
    #[error("cannot compile the seccomp filter")]
    Compile(#[from] libseccomp::error::SeccompError),
    #[error("cannot read back the seccomp filter")]
    Export(#[source] std::io::Error),
    #[error("the seccomp filter has {count} instructions, more than {MAX_INSTRUCTIONS}")]
    TooLong { count: usize },
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, SeccompError> {
    use LinuxSeccompAction as A;
    let errno = errno.unwrap_or(libc::EPERM as u32);
    Ok(match action {
        A::ScmpActKill | A::ScmpActKillThread => ScmpAction::KillThread,
        A::ScmpActKillProcess => ScmpAction::KillProcess,
        A::ScmpActTrap => ScmpAction::Trap,
        A::ScmpActErrno => ScmpAction::Errno(errno as i32),
        A::ScmpActTrace => ScmpAction::Trace(errno as u16),
        A::ScmpActLog => ScmpAction::Log,
        A::ScmpActAllow => ScmpAction::Allow,
        A::ScmpActNotify => return Err(SeccompError::Action { action }),
    })
}

fn comparison(syscall: &str, arg: &LinuxSeccompArg) -> Result<ScmpArgCompare, SeccompError> {
    use LinuxSeccompOperator as O;
    let index = u32::try_from(arg.index())
        .ok()
        .filter(|&index| index < 6)
        .ok_or_else(|| SeccompError::Argument {
            syscall: syscall.to_owned(),
            index: arg.index(),
        })?;
    let (op, datum) = match arg.op() {
        O::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        O::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        O::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        O::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        O::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        O::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // OCI: value is the mask, valueTwo what the masked argument equals.
        O::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(arg.value()),
            arg.value_two().unwrap_or(0),
        ),
    };
    Ok(ScmpArgCompare::new(index, op, datum))
}

pub fn compile(spec: &LinuxSeccomp) -> Result<SeccompFilter, SeccompError> {
    let default = action(spec.default_action(), spec.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(default)?;
    // The agent sets no_new_privs itself, where the spec says so.
    context.set_ctl_nnp(false)?;
    for rule in spec.syscalls().iter().flatten() {
        let rule_action = action(rule.action(), rule.errno_ret())?;
        if rule_action == default {
            // libseccomp refuses a rule that says what the default says.
            continue;
        }
        for name in rule.names() {
            // A profile names calls of many kernels; those this one cannot
            // have are left out, as every runtime does.
            let Ok(syscall) = ScmpSyscall::from_name(name) else {
                continue;
            };
            let args = rule.args().as_deref().unwrap_or_default();
            let comparisons = args
                .iter()
                .map(|arg| comparison(name, arg))
                .collect::<Result<Vec<_>, _>>()?;
            let mut indexes: Vec<usize> = args.iter().map(LinuxSeccompArg::index).collect();
            indexes.sort_unstable();
            if indexes.windows(2).any(|pair| pair[0] == pair[1]) {
                // Conditions on one argument cannot be joined in one rule; the
                // field's runtimes take them as alternatives.
                for comparison in comparisons {
                    context.add_rule_conditional(rule_action, syscall, &[comparison])?;
                }
            } else {
                context.add_rule_conditional(rule_action, syscall, &comparisons)?;
            }
        }
    }
    let mut flags = 0;
    for flag in spec.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            // The calls of a listener, and what this agent does not know.
            other => return Err(SeccompError::Flag { flag: *other }),
        };
    }
    Ok(SeccompFilter {
        program: export(&context)?,
        flags,
    })
}

fn export(context: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>, SeccompError> {
    let file = memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC)
        .map_err(|errno| SeccompError::Export(errno.into()))?;
    context.export_bpf(&file)?;
    let mut file = File::from(file);
    file.rewind().map_err(SeccompError::Export)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(SeccompError::Export)?;
    let count = bytes.len() / INSTRUCTION;
    if count > MAX_INSTRUCTIONS {
        return Err(SeccompError::TooLong { count });
    }
    Ok(bytes
        .chunks_exact(INSTRUCTION)
        .map(|b| libc::sock_filter {
            code: u16::from_ne_bytes([b[0], b[1]]),
            jt: b[2],
            jf: b[3],
            k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> LinuxSeccomp {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_profile_compiles_and_ignores_calls_of_other_kernels() {
        let filter = compile(&parse(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,
                "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
                "syscalls":[
                  {"names":["read","write","no_such_call"],"action":"SCMP_ACT_ALLOW"},
                  {"names":["personality"],"action":"SCMP_ACT_ALLOW",
                   "args":[{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
                  {"names":["clone"],"action":"SCMP_ACT_ALLOW",
                   "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
        ))
        .unwrap();
        assert!(filter.program.len() > 5, "{:?}", filter.program);
        // BPF_RET | BPF_K of the default: SECCOMP_RET_ERRNO | ENOSYS.
        assert!(
            filter
                .program
                .iter()
                .any(|i| i.code == 0x06 && i.k == 0x0005_0026)
        );
    }

    #[test]
    fn an_argument_that_no_call_has_is_refused() {
        let error = compile(&parse(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO",
                "args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
        ))
        .unwrap_err();
        assert!(
            matches!(error, SeccompError::Argument { index: 6, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_flag_is_kept_or_refused() {
        let compile = |flag: &str| {
            compile(&parse(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","flags":["{flag}"]}}"#
            )))
        };
        let filter = compile("SECCOMP_FILTER_FLAG_LOG").unwrap();
        assert_eq!(filter.flags, libc::SECCOMP_FILTER_FLAG_LOG);
        let error = compile("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV").unwrap_err();
        assert!(matches!(error, SeccompError::Flag { .. }), "{error}");
    }

    #[test]
    fn notify_is_not_supported() {
        let error = compile(&parse(r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#)).unwrap_err();
        assert!(matches!(error, SeccompError::Action { .. }), "{error}");
    }
}
