//! `drupe logs --console POD`: what a pod's guest has printed.
//!
//! A follower is woken by the kernel: by inotify when the VMM writes to the
//! file, and by the VMM's process descriptor when it ends.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use podsandbox::record::PodKind;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::console::{Console, shown};
use super::{CliError, Daemon, Pod, choose, runtime, short};

pub fn run(socket: &Path, wanted: &str, follow: bool) -> Result<(), CliError> {
    let runtime = runtime()?;
    let (mut daemon, pod) = runtime.block_on(async {
        let mut daemon = Daemon::connect(socket).await?;
        let listed = choose(daemon.list().await?, wanted)?;
        let gone = CliError::NoSuchPod {
            wanted: wanted.to_owned(),
        };
        let pod = daemon.show(listed).await?.ok_or(gone)?;
        Ok::<_, CliError>((daemon, pod))
    })?;
    let id = short(&pod.listed.id).to_owned();
    if pod.details.kind == PodKind::Host {
        return Err(CliError::NodesKernel { pod: id });
    }
    let path = pod.details.console.clone();
    let file = File::open(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => CliError::NoMachine {
            pod: id,
            state: pod.state(),
        },
        _ => CliError::Console {
            path: path.clone(),
            source,
        },
    })?;
    let mut reader = Reader {
        path: &path,
        console: Console::new(file),
        out: io::stdout(),
    };
    if !follow {
        return reader.print(true).map(drop);
    }
    let failed = |source| CliError::Follow {
        path: path.clone(),
        source,
    };
    // Watched before it is asked whether there is something to wait for.
    let watch = watch(&path).map_err(|errno| failed(errno.into()))?;
    let vmm = hold(&pod).map_err(failed)?;
    let asked = pod.details.pid;
    let pod = runtime.block_on(daemon.show(pod.listed))?;
    let runs = pod.is_some_and(|pod| pod.may_run() && pod.details.pid == asked);
    match (vmm, runs) {
        (Some(vmm), true) => reader.follow(&watch, &vmm),
        _ => reader.print(true).map(drop),
    }
}

fn watch(path: &Path) -> nix::Result<Inotify> {
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    match watch.add_watch(path, AddWatchFlags::IN_MODIFY) {
        // What is gone is not written to.
        Ok(_) | Err(Errno::ENOENT) => Ok(watch),
        Err(errno) => Err(errno),
    }
}

/// The pod's VMM; None: it has ended, or was not there yet.
fn hold(pod: &Pod) -> io::Result<Option<OwnedFd>> {
    let pid = pod.details.pid.and_then(|pid| i32::try_from(pid).ok());
    let Some(pid) = pid.and_then(Pid::from_raw) else {
        return Ok(None);
    };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(vmm) => Ok(Some(vmm)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

struct Reader<'a> {
    path: &'a Path,
    console: Console,
    out: io::Stdout,
}

impl Reader<'_> {
    /// What is new, to the output.
    fn print(&mut self, is_last: bool) -> Result<(), CliError> {
        let new = self
            .console
            .read_new(is_last)
            .map_err(|source| CliError::Console {
                path: self.path.to_owned(),
                source,
            })?;
        let text = if self.out.is_terminal() {
            shown(&new)
        } else {
            new
        };
        let mut out = self.out.lock();
        out.write_all(&text)
            .and_then(|()| out.flush())
            .map_err(CliError::Output)
    }

    /// Until the VMM has ended, or nobody reads the output any more.
    fn follow(&mut self, watch: &Inotify, vmm: &OwnedFd) -> Result<(), CliError> {
        let out = io::stdout();
        loop {
            self.print(false)?;
            let mut fds = [
                PollFd::new(watch.as_fd(), PollFlags::POLLIN),
                // Readable once the process has ended.
                PollFd::new(vmm.as_fd(), PollFlags::POLLIN),
                // Nothing is waited for; an error is told all the same.
                PollFd::new(out.as_fd(), PollFlags::empty()),
            ];
            let woken = match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                woken => woken.and_then(|_| drain(watch)),
            };
            woken.map_err(|errno| CliError::Follow {
                path: self.path.to_owned(),
                source: errno.into(),
            })?;
            let [_, vmm, out] = &fds;
            if out.any() == Some(true) {
                return Ok(());
            }
            if vmm.any() == Some(true) {
                return self.print(true);
            }
        }
    }
}

/// What is read after this is at least what the events were about.
fn drain(watch: &Inotify) -> nix::Result<()> {
    loop {
        match watch.read_events() {
            Ok(_) => {}
            Err(Errno::EAGAIN) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
}
