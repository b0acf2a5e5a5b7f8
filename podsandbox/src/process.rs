//! Waiting for the end of a VMM that may not be a child of this daemon.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A VMM, held so that its process id cannot come to mean another process.
pub struct Process {
    pidfd: OwnedFd,
}

impl Process {
    /// The running VMM of pod `id`, or None if `pid` is not that any more.
    pub fn open(pid: u32, id: &str) -> Option<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Looked at after the descriptor is held, so it is of that process.
        let cmdline = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
        let is_ours = cmdline
            .split(|&byte| byte == 0)
            .any(|word| word == id.as_bytes());
        is_ours.then_some(Self { pidfd })
    }

    pub fn kill(&self) {
        if let Err(error) = pidfd_send_signal(&self.pidfd, Signal::KILL) {
            tracing::debug!(%error, "the VMM ended before it was killed");
        }
    }

    /// Returns whether the process, and with it its PID namespace, ended in
    /// time.
    pub async fn ended_within(self, limit: Duration) -> bool {
        let wait = move || {
            let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
            // A process descriptor is readable once the process has ended.
            poll(
                &mut [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)],
                timeout,
            )
        };
        matches!(tokio::task::spawn_blocking(wait).await, Ok(Ok(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_pods_own_process_is_taken() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        assert!(Process::open(child.id(), "another-pod").is_none());
        let process = Process::open(child.id(), "1000").unwrap();
        process.kill();
        assert!(process.ended_within(Duration::from_secs(10)).await);
        child.wait().unwrap();
    }
}
