//! PID 1 of the PID namespace that a pod's containers share: it reaps what
//! they leave, and ends with the supervisor.

use std::io::{self, PipeWriter};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::thread;

use drupe_agent::reaper::{ExitCode, Reaper};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{WaitOptions, wait};
use tokio::sync::oneshot;

use crate::error::Error;

/// The holder, for as long as this lives.
#[derive(Debug)]
pub struct Pause {
    pub pid: u32,
    /// Its end is what ends the process.
    _alive: PipeWriter,
    /// Keeps the reaper from taking its exit for somebody else's.
    _exit: oneshot::Receiver<ExitCode>,
}

impl Pause {
    /// On a thread made for it, because `unshare(CLONE_NEWPID)` is for all
    /// later children of the calling thread.
    pub fn start(reaper: &Reaper) -> Result<Self, Error> {
        let failed = |source| Error::File {
            action: "run",
            path: "/proc/self/exe".into(),
            source,
        };
        let (theirs, alive) = io::pipe().map_err(failed)?;
        let recording = reaper.record();
        let spawn = move || {
            unshare(CloneFlags::CLONE_NEWPID)?;
            let child = Command::new("/proc/self/exe")
                .arg("pause")
                .stdin(theirs)
                .stdout(Stdio::null())
                .spawn()?;
            Ok(child.id())
        };
        let spawned = thread::scope(|scope| scope.spawn(spawn).join());
        let pid = spawned.unwrap_or_else(|_| Err(io::Error::other("the spawning thread panicked")));
        let pid = pid.map_err(failed)?;
        Ok(Self {
            pid,
            _alive: alive,
            _exit: recording.watch(pid.cast_signed()),
        })
    }
}

/// What the process does.
pub fn hold() -> Result<(), Error> {
    let failed = |source| Error::File {
        action: "wait on",
        path: "/dev/stdin".into(),
        source,
    };
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block().map_err(|e| failed(e.into()))?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&mask, flags).map_err(|e| failed(e.into()))?;
    let stdin = io::stdin();
    loop {
        let mut fds = [
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        // Nothing is ever written: it is the end.
        if fds[0].any().unwrap_or(true) {
            return Ok(());
        }
        while let Ok(Some(_)) = signals.read_signal() {}
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
    }
}
