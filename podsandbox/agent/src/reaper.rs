//! PID 1 reaps every process of the guest; whoever started one waits here for
//! its exit.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended, as a shell gives it: 128 + signal when a signal did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitCode(pub i32);

impl ExitCode {
    pub const KILLED: Self = Self(128 + libc::SIGKILL);

    fn from_status(status: i32) -> Self {
        if libc::WIFSIGNALED(status) {
            Self(128 + libc::WTERMSIG(status))
        } else {
            Self(libc::WEXITSTATUS(status))
        }
    }
}

/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Reaper {
    waiting: Arc<Mutex<HashMap<i32, oneshot::Sender<ExitCode>>>>,
}

impl Reaper {
    /// Reaps for as long as the runtime lives.
    pub fn start() -> std::io::Result<Self> {
        let reaper = Self::default();
        let signals = signal(SignalKind::child())?;
        tokio::spawn(reaper.clone().run(signals));
        Ok(reaper)
    }

    /// The exit of child `pid`. To be called in the same step in which the
    /// child was made: nothing is reaped before the task yields.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<ExitCode> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert(pid, sender);
        receiver
    }

    async fn run(self, mut signals: Signal) {
        while signals.recv().await.is_some() {
            self.reap();
        }
    }

    fn reap(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut status = 0;
            // SAFETY: writes to `status`, which lives.
            match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
                0 => break,
                -1 if Errno::last() == Errno::EINTR => {}
                -1 => break,
                pid => {
                    if let Some(sender) = waiting.remove(&pid) {
                        // One that nobody waits for any more is only reaped.
                        let _ = sender.send(ExitCode::from_status(status));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    #[expect(clippy::zombie_processes, reason = "the reaper waits for them")]
    async fn exits_and_signals_reach_the_one_who_waits() {
        let reaper = Reaper::start().unwrap();
        let spawn = |script: &str| {
            let child = std::process::Command::new("sh")
                .args(["-c", script])
                .spawn()
                .unwrap();
            reaper.watch(child.id() as i32)
        };
        let (seven, killed) = (spawn("exit 7"), spawn("kill -9 $$"));
        assert_eq!(seven.await.unwrap(), ExitCode(7));
        assert_eq!(killed.await.unwrap(), ExitCode::KILLED);
    }
}
