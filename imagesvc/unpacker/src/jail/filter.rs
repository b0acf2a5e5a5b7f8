//! The system calls that unpacking takes. Any other one ends the process.
//!
//! Of what is open it reads, writes and changes its place; it takes memory that
//! is not to be run, and ends. It opens nothing, and sends nothing but bytes.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::io;

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use super::{JailError, step};

const ALLOWED: [i64; 13] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_brk,
    libc::SYS_madvise,
    // A map's seed.
    libc::SYS_getrandom,
    // How a program of Rust ends.
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Behind a read that was stopped and goes on.
    libc::SYS_restart_syscall,
];

/// Whether the node's kernel has it.
pub(super) fn install() -> Result<bool, JailError> {
    let program = program().map_err(|error| step("make its filter")(io::Error::other(error)))?;
    match apply_filter(&program) {
        Ok(()) => Ok(true),
        Err(Error::Prctl(error) | Error::Seccomp(error)) if is_lacking(&error) => Ok(false),
        Err(error) => Err(step("filter its system calls")(io::Error::other(error))),
    }
}

fn is_lacking(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL))
}

fn program() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.into_iter().map(|call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_mmap, vec![memory_only()?]);
    SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::try_from(ARCH)?,
    )?
    .try_into()
}

/// mmap of memory: not of a file, and not to be run.
fn memory_only() -> Result<SeccompRule, seccompiler::BackendError> {
    let bits = |argument, mask: i32, value: i32| {
        SeccompCondition::new(
            argument,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::MaskedEq(u64::from(mask.unsigned_abs())),
            u64::from(value.unsigned_abs()),
        )
    };
    SeccompRule::new(vec![
        bits(2, libc::PROT_EXEC, 0)?,
        bits(3, libc::MAP_ANONYMOUS, libc::MAP_ANONYMOUS)?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_for_this_machine() {
        assert!(!program().unwrap().is_empty());
    }
}
