//! The first process of the PID namespace that a pod's containers share: it
//! does nothing but reap orphans.

use std::ffi::c_int;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::errno::Errno;

use super::Error;
use super::go_between;
use super::launch::LaunchError;
use crate::cgroup::{Cgroup, ROOT};
use crate::sys::{self, Cloned};
use crate::userns::UserNamespace;

#[derive(Debug)]
pub struct Pause {
    pidfd: OwnedFd,
}

impl Pause {
    /// The PID namespace belongs to `user` where one is given.
    pub fn start(user: Option<&UserNamespace>) -> Result<Self, Error> {
        // Not below the pod's: that one has controllers, so only its children
        // may have processes.
        let cgroup = Cgroup::create(PathBuf::from(ROOT).join("pause"))?;
        let cgroup = cgroup.dir().as_fd();
        let new = libc::CLONE_NEWPID as u64;
        if let Some(user) = user {
            let inside = go_between::Inside::default();
            let made = go_between::clone_inside(user, &inside, new, cgroup, || reap_for_ever());
            return Ok(made.map(|(_, pidfd)| Self { pidfd })?);
        }
        // SAFETY: the child runs `reap_for_ever`, which neither allocates nor
        // locks and never returns.
        let cloned = unsafe { sys::clone_process(new, Some(cgroup)) };
        match cloned.map_err(LaunchError::Clone)? {
            Cloned::Child => reap_for_ever(),
            Cloned::Parent { pidfd, .. } => Ok(Self { pidfd }),
        }
    }

    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

fn reap_for_ever() -> ! {
    // Failing here only changes what ps shows or what stays open.
    let _ = sys::prctl(libc::PR_SET_NAME, c"pause".as_ptr() as u64, 0);
    let _ = nix::unistd::setsid();
    let _ = sys::close_range(0, RawFd::MAX);
    // SAFETY: blocks signals, which then stay pending for sigwaitinfo, and
    // reaps; every pointer is null or to a variable that lives.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        let mut child: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut child);
        libc::sigaddset(&raw mut child, libc::SIGCHLD);
        loop {
            let mut status: c_int = 0;
            if libc::waitpid(-1, &raw mut status, 0) == -1 && Errno::last() == Errno::ECHILD {
                libc::sigwaitinfo(&raw const child, std::ptr::null_mut());
            }
        }
    }
}
