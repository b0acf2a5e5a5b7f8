//! Makes a process in a user namespace.
//!
//! The agent cannot enter one: there is no way back. So a process of its own
//! does, and makes the one that is wanted from there as the agent's child
//! (`CLONE_PARENT`), so that its mount, PID and cgroup namespaces belong to
//! the user namespace. Before that it does what takes rights in the guest.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::TimeVal;

use super::child::{send_packet, set_oom_score_adj};
use super::launch::{self, LaunchError};
use crate::sys::{self, Cloned};
use crate::userns::{UserNamespace, become_root};

/// What the go-between does beside entering the user namespace.
#[derive(Default)]
pub struct Inside<'a> {
    pub oom_score_adj: Option<&'a CStr>,
    /// Namespaces (`CLONE_NEW*`) of the process behind the descriptor.
    pub joined: Option<(BorrowedFd<'a>, i32)>,
    /// The process whose PID namespace the new one is in.
    pub pid: Option<BorrowedFd<'a>>,
}

/// Number and error code, as the go-between tells them.
const ANSWER_LEN: usize = 8;

/// It makes ten system calls; a container that is out of memory may hold it
/// up, and with it the agent.
const ANSWER_TIMEOUT: TimeVal = TimeVal::new(5, 0);

/// A process in `user`, in new `namespaces` and in `cgroup`, that does `run`,
/// which must neither allocate nor take locks, nor return. Waits for the go-between.
pub fn clone_inside(
    user: &UserNamespace,
    inside: &Inside<'_>,
    namespaces: u64,
    cgroup: BorrowedFd<'_>,
    run: impl FnOnce(),
) -> Result<(i32, OwnedFd), LaunchError> {
    let (ours, theirs) = launch::channel()?;
    setsockopt(&ours, ReceiveTimeout, &ANSWER_TIMEOUT).map_err(LaunchError::UserNamespace)?;
    // SAFETY: the child neither allocates nor locks, nor does what it clones,
    // and it ends here.
    match unsafe { sys::clone_process(0, Some(cgroup)) }.map_err(LaunchError::Clone)? {
        Cloned::Child => {
            let run = || {
                // Its end is to say that the go-between has gone. A descriptor
                // that is open can be closed.
                let _ = sys::close_range(theirs.as_raw_fd(), theirs.as_raw_fd());
                run()
            };
            let made = stand_between(user, inside, namespaces, run);
            let mut answer = [0; ANSWER_LEN];
            let (pid, errno) = match &made {
                Ok((pid, _)) => (*pid, 0),
                Err(errno) => (0, *errno as i32),
            };
            answer[..4].copy_from_slice(&pid.to_ne_bytes());
            answer[4..].copy_from_slice(&errno.to_ne_bytes());
            let pidfd = made.ok().map(|(_, pidfd)| pidfd);
            let pidfd = pidfd.as_ref().map(AsRawFd::as_raw_fd);
            // Nobody is left to tell when the agent is gone.
            let _ = send_packet(theirs.as_raw_fd(), &answer, pidfd);
            // SAFETY: ends the process without running the agent's exit
            // handlers.
            unsafe { libc::_exit(0) }
        }
        Cloned::Parent { .. } => {}
    }
    drop(theirs);
    let mut answer = [0; ANSWER_LEN];
    let received = loop {
        match launch::receive_packet(ours.as_fd(), &mut answer) {
            Err(Errno::EINTR) => {}
            received => break received,
        }
    };
    let (length, pidfd) = received.map_err(LaunchError::UserNamespace)?;
    if length != ANSWER_LEN {
        return Err(LaunchError::Vanished);
    }
    let number = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&answer[at..at + 4]);
        i32::from_ne_bytes(bytes)
    };
    match (number(4), pidfd) {
        (0, Some(pidfd)) => Ok((number(0), pidfd)),
        (0, None) => Err(LaunchError::Vanished),
        (errno, _) => Err(LaunchError::UserNamespace(Errno::from_raw(errno))),
    }
}

fn stand_between(
    user: &UserNamespace,
    inside: &Inside<'_>,
    namespaces: u64,
    run: impl FnOnce(),
) -> sys::Result<(i32, OwnedFd)> {
    // A copy of the agent's memory, about to be in reach of the container's
    // root.
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0)?;
    if let Some(score) = inside.oom_score_adj {
        set_oom_score_adj(score)?;
    }
    if let Some((target, joined)) = inside.joined {
        sys::setns(target.as_raw_fd(), joined)?;
    }
    if let Some(target) = inside.pid {
        sys::setns(target.as_raw_fd(), libc::CLONE_NEWPID)?;
    }
    sys::setns(user.as_fd().as_raw_fd(), libc::CLONE_NEWUSER)?;
    become_root()?;
    // SAFETY: `run` neither allocates nor locks and never returns.
    match unsafe { sys::clone_process(namespaces | libc::CLONE_PARENT as u64, None) }? {
        Cloned::Child => {
            run();
            // It has not done what it was to.
            std::process::abort()
        }
        Cloned::Parent { pid, pidfd } => Ok((pid, pidfd)),
    }
}
