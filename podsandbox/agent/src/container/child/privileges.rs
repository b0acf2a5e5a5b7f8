//! Limits, user, capabilities and system call filter of the new process.

use nix::errno::Errno;

use super::{At, LAST_CAPABILITY, Result};
use crate::container::plan::{Capabilities, Identity, Step};
use crate::sys::{self, CapSets};

pub(super) fn set_limits(identity: &Identity) -> Result<()> {
    for (index, limit) in identity.rlimits.iter().enumerate() {
        let value = libc::rlimit {
            rlim_cur: limit.soft,
            rlim_max: limit.hard,
        };
        // SAFETY: reads `value`, which lives.
        let result = unsafe { libc::setrlimit(limit.resource, &raw const value) };
        Errno::result(result).map(drop).at(Step::Rlimit, index)?;
    }
    Ok(())
}

/// Takes the user's ids, with all capabilities kept for the steps that follow.
pub(super) fn become_user(identity: &Identity) -> Result<()> {
    // SAFETY: sets this process's umask.
    unsafe { libc::umask(identity.umask.unwrap_or(0o022)) };
    drop_bounding_set(identity.capabilities)?;
    if identity.uid != 0 {
        sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).at(Step::User, 0)?;
    }
    // The system calls, not the libc functions: those tell every thread.
    // SAFETY: reads `groups`, which lives, and takes integers.
    unsafe {
        let groups = &identity.groups;
        Errno::result(libc::syscall(
            libc::SYS_setgroups,
            groups.len(),
            groups.as_ptr(),
        ))
        .at(Step::Groups, 0)?;
        let (uid, gid) = (identity.uid, identity.gid);
        if gid != 0 {
            Errno::result(libc::syscall(libc::SYS_setresgid, gid, gid, gid)).at(Step::User, 1)?;
        }
        if uid != 0 {
            Errno::result(libc::syscall(libc::SYS_setresuid, uid, uid, uid)).at(Step::User, 2)?;
        }
    }
    Ok(())
}

fn drop_bounding_set(capabilities: Capabilities) -> Result<()> {
    for capability in 0..=LAST_CAPABILITY {
        if capabilities.bounding & (1 << capability) == 0 {
            match sys::prctl(libc::PR_CAPBSET_DROP, u64::from(capability), 0) {
                // A kernel that does not know the capability.
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(errno) => return Err(errno).at(Step::CapabilityBounds, capability as usize),
            }
        }
    }
    Ok(())
}

/// The last steps, in the one order that works: a filter without
/// no_new_privs needs CAP_SYS_ADMIN, and nothing after it may need a call that
/// the filter refuses, beyond `capset`, `prctl` and `execve`.
pub(super) fn drop_privileges(identity: &Identity) -> Result<()> {
    if identity.no_new_privileges {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).at(Step::NoNewPrivileges, 0)?;
        set_capabilities(identity)?;
        install_filter(identity)
    } else {
        if identity.seccomp.is_some() && identity.uid != 0 {
            // setresuid has emptied the effective set, KEEPCAPS only kept the
            // permitted one.
            let all = u64::MAX >> (63 - LAST_CAPABILITY);
            let sets = CapSets {
                effective: all,
                permitted: all,
                inheritable: 0,
            };
            sys::capset(sets).at(Step::Capabilities, 0)?;
        }
        install_filter(identity)?;
        set_capabilities(identity)
    }
}

fn install_filter(identity: &Identity) -> Result<()> {
    match &identity.seccomp {
        Some(filter) => sys::seccomp_filter(&filter.program, filter.flags).at(Step::Seccomp, 0),
        None => Ok(()),
    }
}

fn set_capabilities(identity: &Identity) -> Result<()> {
    let capabilities = identity.capabilities;
    let sets = CapSets {
        effective: capabilities.effective,
        permitted: capabilities.permitted,
        inheritable: capabilities.inheritable,
    };
    sys::capset(sets).at(Step::Capabilities, 1)?;
    for capability in 0..=LAST_CAPABILITY {
        if capabilities.ambient & (1 << capability) != 0 {
            let raise = libc::PR_CAP_AMBIENT_RAISE as u64;
            sys::prctl(libc::PR_CAP_AMBIENT, raise, u64::from(capability))
                .at(Step::Capabilities, 2)?;
        }
    }
    Ok(())
}
