//! PID 1 reaps every process of the guest; whoever started one waits here for
//! its exit.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended, as a shell gives it: 128 + signal when a signal did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitCode(pub i32);

impl ExitCode {
    pub const KILLED: Self = Self(128 + libc::SIGKILL);
    /// Somebody else has learnt it.
    pub const UNKNOWN: Self = Self(255);

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
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<i32, oneshot::Sender<ExitCode>>,
    /// How many [`Recording`]s there are.
    recordings: usize,
    /// Exits that nobody waited for while there was one.
    unclaimed: HashMap<i32, ExitCode>,
}

/// Keeps the exits of processes whose ids are not known yet: a runtime that is
/// run makes a child that may have ended before its id was told.
#[derive(Debug)]
pub struct Recording(Reaper);

impl Recording {
    /// The exit of process `pid`, which was made since the recording began by one
    /// that has ended. If that has reaped it as well, the exit is unknown.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<ExitCode> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.0.state();
        let told = match state.unclaimed.remove(&pid) {
            Some(code) => Some(code),
            None if is_child(pid) => None,
            None => Some(ExitCode::UNKNOWN),
        };
        match told {
            Some(code) => drop(sender.send(code)),
            None => drop(state.waiting.insert(pid, sender)),
        }
        receiver
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.recordings -= 1;
        if state.recordings == 0 {
            state.unclaimed.clear();
        }
    }
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
        self.state().waiting.insert(pid, sender);
        receiver
    }

    /// To be begun before the process is run whose child is to be watched.
    pub fn record(&self) -> Recording {
        self.state().recordings += 1;
        Recording(self.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one call.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self, mut signals: Signal) {
        while signals.recv().await.is_some() {
            self.reap();
        }
    }

    fn reap(&self) {
        let mut state = self.state();
        loop {
            let mut status = 0;
            // SAFETY: writes to `status`, which lives.
            match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
                0 => break,
                -1 if Errno::last() == Errno::EINTR => {}
                -1 => break,
                pid => {
                    let code = ExitCode::from_status(status);
                    if let Some(sender) = state.waiting.remove(&pid) {
                        // One that nobody waits for any more is only reaped.
                        let _ = sender.send(code);
                    } else if state.recordings > 0 {
                        state.unclaimed.insert(pid, code);
                    }
                }
            }
        }
    }
}

/// Whether it is one of ours, running or not reaped yet.
fn is_child(pid: i32) -> bool {
    let id = Id::Pid(Pid::from_raw(pid));
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    waitid(id, look) != Err(Errno::ECHILD)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reaper takes every child of the process: one test at a time.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    #[tokio::test(flavor = "current_thread")]
    #[expect(clippy::zombie_processes, reason = "the reaper waits for them")]
    async fn exits_and_signals_reach_the_one_who_waits() {
        let _alone = ALONE.lock().await;
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

    #[tokio::test(flavor = "current_thread")]
    async fn an_exit_is_kept_while_it_is_recorded() {
        let _alone = ALONE.lock().await;
        let reaper = Reaper::start().unwrap();
        let recording = reaper.record();
        let spawn = |script: &str| {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", script]).spawn().unwrap().id() as i32
        };
        let early = spawn("exit 4");
        let after = reaper.watch(spawn("exit 5"));
        // Signals are handled in order: once the later one was, so was the
        // earlier, or it is told as it comes.
        assert_eq!(after.await.unwrap(), ExitCode(5));
        assert_eq!(recording.watch(early).await.unwrap(), ExitCode(4));
        drop(recording);
        assert!(reaper.state().unclaimed.is_empty());
    }
}
