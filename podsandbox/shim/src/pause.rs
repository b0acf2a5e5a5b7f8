//! The PID namespace that a pod's containers share, and its first process: it
//! reaps what they leave, and ends with the supervisor.
//!
//! Containers see that process as PID 1, and one that may trace reaches all
//! that it has; so before anything joins the namespace, the process has given
//! up everything of the node ([`hold`]) and has said so.

mod hold;

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::thread;

use drupe_agent::reaper::{ExitCode, Reaper};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::oneshot;

pub use hold::hold;

use crate::error::Error;

/// It has a few dozen system calls to make.
const READY_WITHIN_MS: u16 = 5000;
/// What it says once it is ready.
const READY: u8 = b'.';
/// What is entered, from the thread that has made it.
const NAMESPACE: &str = "/proc/thread-self/ns/pid_for_children";

/// The holder, for as long as this lives.
#[derive(Debug)]
pub struct Pause {
    pub pid: i32,
    /// Which stays the same whatever the process's id comes to mean.
    pub namespace: OwnedFd,
    /// Its end is what ends the process.
    _alive: PipeWriter,
}

impl Pause {
    /// The process is ready to be seen by containers; its exit comes beside
    /// it.
    pub async fn start(reaper: &Reaper) -> Result<(Self, oneshot::Receiver<ExitCode>), Error> {
        let recording = reaper.record();
        let (done, spawned) = oneshot::channel();
        // On a thread made for it, because `unshare(CLONE_NEWPID)` is for all
        // later children of the calling thread.
        thread::Builder::new()
            .name("pause-spawn".into())
            .spawn(move || drop(done.send(spawn())))
            .map_err(Error::Pause)?;
        let spawned = spawned.await;
        let spawned = spawned.map_err(|_| Error::Pause(io::Error::other("a thread panicked")))?;
        let spawned = spawned.map_err(Error::Pause)?;
        let mut exit = recording.watch(spawned.pid);
        match spawned.made {
            Ok((namespace, alive)) => {
                let pause = Self {
                    pid: spawned.pid,
                    namespace,
                    _alive: alive,
                };
                Ok((pause, exit))
            }
            Err(error) => {
                // Not reaped, so the id is its own.
                if exit.try_recv() == Err(oneshot::error::TryRecvError::Empty)
                    && let Err(errno) = kill(Pid::from_raw(spawned.pid), Signal::SIGKILL)
                {
                    tracing::warn!(%errno, "cannot end a process given up");
                }
                Err(Error::Pause(error))
            }
        }
    }
}

struct Spawned {
    pid: i32,
    made: io::Result<(OwnedFd, PipeWriter)>,
}

fn spawn() -> io::Result<Spawned> {
    let (theirs, alive) = io::pipe()?;
    let (ready, says) = io::pipe()?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    // Its standard error is the supervisor's, for what goes wrong, until it is
    // ready.
    let mut command = Command::new("/proc/self/exe");
    command.arg("pause").stdin(theirs).stdout(says);
    let child = command.spawn()?;
    // Its ends of the pipes are to be the child's alone.
    drop(command);
    let made = await_ready(ready).and_then(|()| Ok((File::open(NAMESPACE)?.into(), alive)));
    Ok(Spawned {
        pid: child.id().cast_signed(),
        made,
    })
}

fn await_ready(mut ready: PipeReader) -> io::Result<()> {
    let mut fds = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, PollTimeout::from(READY_WITHIN_MS))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut said = [0];
    ready.read_exact(&mut said).map_err(|_| {
        io::Error::other("its holder ended before it was ready; the supervisor's log says why")
    })
}
