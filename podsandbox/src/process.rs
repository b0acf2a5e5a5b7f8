//! Waiting for the end of a VMM that may not be a child of this daemon.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// An exec takes well under a millisecond of its process's own time; a busy
/// node may not give it that for a while. Kernel threads never have arguments.
const EXEC_LOOK_MS: u8 = 2;
const EXEC_LOOKS: usize = 250;

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
        let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
        // Until its exec is over a process shows those of the one that spawned
        // it, us perhaps, or none; the kernel reports no event for its end.
        let own = fs::read("/proc/self/cmdline").ok()?;
        for _ in 0..EXEC_LOOKS {
            let cmdline = fs::read(&path).ok()?;
            if !cmdline.is_empty() && cmdline != own {
                let is_ours = cmdline
                    .split(|&byte| byte == 0)
                    .any(|word| word == id.as_bytes());
                return is_ours.then_some(Self { pidfd });
            }
            // Nor does one that has ended; that can be waited for.
            let ended = poll(
                &mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)],
                EXEC_LOOK_MS,
            );
            if matches!(ended, Ok(1)) {
                return None;
            }
        }
        None
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
        // Ended but not yet collected: it has no arguments any more.
        assert!(Process::open(child.id(), "1000").is_none());
        child.wait().unwrap();
    }

    #[test]
    fn a_process_is_known_from_the_moment_it_was_spawned() {
        for _ in 0..300 {
            let mut child = std::process::Command::new("sleep")
                .arg("1000")
                .spawn()
                .unwrap();
            let process = Process::open(child.id(), "1000");
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(process.is_some());
        }
    }
}
