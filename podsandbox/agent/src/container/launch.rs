//! Starts a process from a [`Plan`] and talks to it until it has called
//! `execve`.
//!
//! Why not libcontainer: measured on a spec as the daemon writes it, one
//! create takes it 900 system calls, two forks of the agent, a synchronous
//! wait in the agent's only thread and a move between cgroups; where a system
//! call takes 80 µs and a fork 1 ms (UML), that alone is twice the time a
//! container may take. It reaps its own child, which PID 1 does as well, sets
//! PID 1's own oom_score_adj and dumpable flag, and keeps state files. Here it
//! is one `clone3` straight into the cgroup and the calls the spec asks for.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, send, socketpair,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::child;
use super::go_between::{self, Inside};
use super::plan::{Entry, Failure, Labels, MESSAGE_LEN, Message, Plan, Step};
use crate::sys::{self, Cloned};

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("cannot make a channel to a new process")]
    Channel(#[source] std::io::Error),
    #[error("cannot join the PID namespace of the pod's containers")]
    PidNamespace(#[source] Errno),
    #[error("cannot make a process")]
    Clone(#[source] Errno),
    #[error("cannot make a process in the pod's user namespace")]
    UserNamespace(#[source] Errno),
    #[error("{0}")]
    Setup(String),
    #[error("the process ended before it had run the program")]
    Vanished,
    #[error(transparent)]
    Exec(ExecError),
}

/// Why `execve` failed, in the words that the users of containers know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("exec: {name:?}: {why}")]
pub struct ExecError {
    name: String,
    why: String,
    /// What a shell answers: 127 not found, 126 not executable.
    pub code: i32,
}

impl ExecError {
    fn new(name: &str, errno: Errno) -> Self {
        let (why, code) = match errno {
            Errno::ENOENT if name.contains('/') => ("no such file or directory".to_owned(), 127),
            Errno::ENOENT => ("executable file not found in $PATH".to_owned(), 127),
            Errno::ELIBACC => ("its interpreter was not found".to_owned(), 127),
            Errno::EACCES => ("permission denied".to_owned(), 126),
            Errno::ENOEXEC => ("exec format error".to_owned(), 126),
            errno => (errno.desc().to_owned(), 126),
        };
        Self {
            name: name.to_owned(),
            why,
            code,
        }
    }
}

/// Which PID namespace a new process is in.
#[derive(Clone, Copy, Debug)]
pub enum PidNamespace<'a> {
    /// The agent's.
    Guest,
    /// One of its own.
    New,
    /// That of the process behind the descriptor.
    Join(BorrowedFd<'a>),
}

/// A process between `clone3` and `execve`.
#[derive(Debug)]
pub struct Launched {
    pub pid: i32,
    pub pidfd: OwnedFd,
    channel: AsyncFd<OwnedFd>,
    labels: Labels,
    name: String,
}

/// The two ends of the socket between agent and child.
pub fn channel() -> Result<(OwnedFd, OwnedFd), LaunchError> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|errno| LaunchError::Channel(errno.into()))
}

/// Makes the process. `mount_namespace`: with one of its own from the start.
pub fn launch(
    plan: Plan,
    ours: OwnedFd,
    pid: PidNamespace<'_>,
    mount_namespace: bool,
    cgroup: BorrowedFd<'_>,
) -> Result<Launched, LaunchError> {
    let channel = |error| LaunchError::Channel(error);
    nix::fcntl::fcntl(
        &ours,
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
    )
    .map_err(|errno| channel(errno.into()))?;
    let ours = sys::async_fd(ours, Interest::READABLE).map_err(channel)?;
    let labels = Labels::of(&plan);
    let name = plan.program.argv.strings().first();
    let name = name
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();

    let mut namespaces = 0;
    if mount_namespace {
        namespaces |= libc::CLONE_NEWNS as u64;
    }
    if let PidNamespace::New = pid {
        namespaces |= libc::CLONE_NEWPID as u64;
    }
    let cloned = match (&plan.user, pid) {
        (Some(user), pid) => {
            let inside = Inside {
                oom_score_adj: plan.identity.oom_score_adj.as_deref(),
                joined: match &plan.entry {
                    Entry::Join { pidfd, namespaces } => Some((pidfd.as_fd(), *namespaces)),
                    Entry::Create(_) => None,
                },
                pid: match pid {
                    PidNamespace::Join(target) => Some(target),
                    PidNamespace::Guest | PidNamespace::New => None,
                },
            };
            let run = || child::run(&plan);
            go_between::clone_inside(user, &inside, namespaces, cgroup, run)
        }
        (None, PidNamespace::Join(target)) => {
            in_pid_namespace(target, || clone(&plan, namespaces, cgroup))
        }
        (None, PidNamespace::Guest | PidNamespace::New) => clone(&plan, namespaces, cgroup),
    };
    let (pid, pidfd) = cloned?;
    Ok(Launched {
        pid,
        pidfd,
        channel: ours,
        labels,
        name,
    })
}

fn clone(
    plan: &Plan,
    namespaces: u64,
    cgroup: BorrowedFd<'_>,
) -> Result<(i32, OwnedFd), LaunchError> {
    // SAFETY: the child runs `child::run`, which neither allocates nor locks
    // and never returns.
    match unsafe { sys::clone_process(namespaces, Some(cgroup)) }.map_err(LaunchError::Clone)? {
        Cloned::Child => child::run(plan),
        Cloned::Parent { pid, pidfd } => Ok((pid, pidfd)),
    }
}

/// Runs `make` so that the child it makes is in the PID namespace of `target`.
fn in_pid_namespace<T>(
    target: BorrowedFd<'_>,
    make: impl FnOnce() -> Result<T, LaunchError>,
) -> Result<T, LaunchError> {
    let own = std::fs::File::open("/proc/self/ns/pid").map_err(LaunchError::Channel)?;
    sys::setns(target.as_raw_fd(), libc::CLONE_NEWPID).map_err(LaunchError::PidNamespace)?;
    let made = make();
    // Without this every later child would be in the container's namespace.
    if let Err(errno) = sys::setns(own.as_raw_fd(), libc::CLONE_NEWPID) {
        eprintln!("drupe-agent: cannot return to the guest's PID namespace: {errno}");
        std::process::abort();
    }
    made
}

impl Launched {
    /// Waits until the process is set up and waiting; gives its terminal's
    /// master if it has one.
    pub async fn ready(&self) -> Result<Option<OwnedFd>, LaunchError> {
        match self.receive().await? {
            Some((Message::Ready, terminal)) => Ok(terminal),
            Some((Message::Failed(failure), _)) => Err(self.failed(failure)),
            None => Err(LaunchError::Vanished),
        }
    }

    /// Lets a waiting process go on.
    pub fn go(&self) -> Result<(), LaunchError> {
        match send(self.channel.as_raw_fd(), &[1], MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Err(LaunchError::Vanished),
            Err(errno) => Err(LaunchError::Channel(errno.into())),
        }
    }

    /// Waits for `execve`.
    pub async fn executed(&self) -> Result<(), LaunchError> {
        match self.receive().await? {
            None => Ok(()),
            Some((Message::Failed(failure), _)) => Err(self.failed(failure)),
            Some((Message::Ready, _)) => Err(LaunchError::Vanished),
        }
    }

    fn failed(&self, failure: Failure) -> LaunchError {
        if failure.step == Step::Exec {
            LaunchError::Exec(ExecError::new(&self.name, failure.errno))
        } else {
            LaunchError::Setup(self.labels.describe(failure))
        }
    }

    /// One message, or none once the child's end is closed.
    async fn receive(&self) -> Result<Option<(Message, Option<OwnedFd>)>, LaunchError> {
        let failed = LaunchError::Channel;
        loop {
            let mut ready = self.channel.readable().await.map_err(failed)?;
            match receive(self.channel.as_fd()) {
                Err(Errno::EAGAIN) => ready.clear_ready(),
                // The child has ended without reading all it was sent; what it
                // has said comes first, the end after that.
                Err(Errno::ECONNRESET) => {}
                Err(errno) => return Err(failed(errno.into())),
                Ok(message) => return Ok(message),
            }
        }
    }
}

fn receive(channel: BorrowedFd<'_>) -> sys::Result<Option<(Message, Option<OwnedFd>)>> {
    let mut bytes = [0; MESSAGE_LEN];
    let (length, received) = receive_packet(channel, &mut bytes)?;
    if length == 0 {
        return Ok(None);
    }
    match Message::decode(&bytes[..length]) {
        Some(message) => Ok(Some((message, received))),
        None => Err(Errno::EPROTO),
    }
}

/// One packet's length and the descriptor beside it; 0 at the end.
pub(super) fn receive_packet(
    channel: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> sys::Result<(usize, Option<OwnedFd>)> {
    let mut iov = [IoSliceMut::new(bytes)];
    let mut control = cmsg_space!([libc::c_int; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(channel.as_raw_fd(), &mut iov, Some(&mut control), flags)?;
    let mut received = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel has just made this descriptor for us.
                received = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    Ok((message.bytes, received))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_told_as_users_know_it() {
        let error = ExecError::new("nope", Errno::ENOENT);
        assert_eq!(
            error.to_string(),
            "exec: \"nope\": executable file not found in $PATH"
        );
        assert_eq!(error.code, 127);
        let error = ExecError::new("/bin/nope", Errno::ENOENT);
        assert_eq!(
            error.to_string(),
            "exec: \"/bin/nope\": no such file or directory"
        );
        assert_eq!(ExecError::new("/etc/passwd", Errno::EACCES).code, 126);
    }
}
