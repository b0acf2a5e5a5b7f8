//! One unpacker: started, given its task, asked, ended.
//!
//! It is PID 1 of a PID namespace of its own, and ends with the thread that
//! has started it: with the job, or with the daemon, however that ends.

use std::fmt;
use std::io::{self, PipeReader, Read};
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::write;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::packet;
use crate::protocol::{Done, Fault, Missing, Order, Task, Word, plain};
use crate::wait::Watch;

/// From exec to the jail takes some milliseconds; a node that is overloaded
/// beyond this cannot unpack anything either.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// What is read of what an unpacker has written to its standard error.
const LAST_WORDS: u64 = 1000;

/// How unpackers are run on this node.
#[derive(Clone, Debug)]
pub struct Unpacker {
    /// The `drupe-unpacker` binary.
    pub program: PathBuf,
    /// Nobody else's on the node.
    pub uid: u32,
    pub gid: u32,
    /// Whether nothing is unpacked where the node's kernel lacks a part of the
    /// jail.
    pub strict: bool,
}

/// Why an unpacker did not do its task.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("cannot start {program}: {source}", program = .program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("the unpacker cannot confine itself: {reason}")]
    Jail { reason: String },
    /// It is strict, and the node's kernel lacks a part of its jail.
    #[error("{reason}")]
    Unconfined { reason: String },
    #[error("its unpacker ({task}) {death}")]
    Died { task: &'static str, death: Death },
    #[error("{reason}")]
    Failed { fault: Fault, reason: String },
    #[error("an unpacker answers out of turn: {0}")]
    Nonsense(String),
    #[error("its unpackers took no byte of it for {seconds} s")]
    Stalled { seconds: u64 },
    #[error(transparent)]
    Limit(#[from] crate::LimitError),
    /// The cause is somebody else's.
    #[error("nobody takes what was unpacked")]
    Unread,
    #[error("it was stopped")]
    Stopped,
    #[error("cannot move bytes to or from an unpacker: {0}")]
    Pipe(#[source] io::Error),
}

/// How a process has ended that was not to end.
#[derive(Debug)]
pub struct Death {
    status: ExitStatus,
    last_words: String,
}

impl Death {
    /// The signal that has ended it, if one has.
    #[must_use]
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status.signal() {
            Some(number) => {
                let name = Signal::try_from(number).map_or("unknown", Signal::as_str);
                write!(f, "was killed by signal {number} ({name})")?;
            }
            None => write!(f, "ended with {}", self.status)?,
        }
        if self.last_words.is_empty() {
            return Ok(());
        }
        write!(f, "; its last words: {}", self.last_words)
    }
}

/// One unpacker's work.
#[derive(Debug)]
pub struct Job<'a> {
    pub unpacker: &'a Unpacker,
    /// Of what is unpacked; it stands in the list of processes.
    pub name: &'a str,
    pub task: Task,
    /// As the task wants them.
    pub fds: &'a [BorrowedFd<'a>],
}

/// The right to start an unpacker on the present thread, which was made for
/// it.
#[derive(Debug)]
pub struct Parent(PhantomData<*const ()>);

/// Runs `work` on a thread that is made to start one unpacker: the children of
/// that thread are born into another PID namespace, and they end with it.
///
/// # Errors
/// There are no more threads.
pub fn parent<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce(Parent) -> T + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    thread::Builder::new()
        .name("unpack".into())
        .spawn_scoped(scope, || work(Parent(PhantomData)))
}

/// A running unpacker. Dropping this ends it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    socket: OwnedFd,
    said: PipeReader,
    task: &'static str,
    missing: Vec<Missing>,
    /// Stays where its parent is.
    _parent: Parent,
}

impl Process {
    /// Returns once it is in its jail and has its task.
    ///
    /// # Errors
    /// Nothing is left of a process that could not start.
    pub fn start(parent: Parent, job: &Job<'_>, watch: &Watch<'_>) -> Result<Self, Failure> {
        let program = &job.unpacker.program;
        let failed = |source| Failure::Start {
            program: program.clone(),
            source,
        };
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|e| failed(e.into()))?;
        let (said, says) = io::pipe().map_err(failed)?;
        let mut command = Command::new(program);
        command
            .args([job.task.name(), job.name])
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(theirs)
            .stdout(says.try_clone().map_err(failed)?)
            .stderr(says);
        unshare(CloneFlags::CLONE_NEWPID).map_err(|e| failed(e.into()))?;
        let child = command.spawn().map_err(failed)?;
        // With it go this side's copies of what it has.
        drop(command);
        let mut process = Self {
            child,
            socket: ours,
            said,
            task: job.task.name(),
            missing: Vec::new(),
            _parent: parent,
        };
        let order = Order {
            uid: job.unpacker.uid,
            gid: job.unpacker.gid,
            strict: job.unpacker.strict,
            bounds: job.task.bounds(),
            task: job.task.clone(),
        };
        match packet::send_with(&process.socket, &order, job.fds) {
            // Its end tells more.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            sent => sent.map_err(failed)?,
        }
        match process.word(watch, START_TIMEOUT)? {
            Word::Ready { missing } => process.missing = missing,
            Word::Failed { fault, reason } => {
                let reason = plain(&reason);
                return Err(match fault {
                    Fault::Unconfined => Failure::Unconfined { reason },
                    _ => Failure::Jail { reason },
                });
            }
            other => return Err(nonsense(&other)),
        }
        Ok(process)
    }

    /// What the node's kernel lacks for its jail.
    #[must_use]
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    /// Whether it has said more than that it is ready, or has died.
    #[must_use]
    pub fn has_spoken(&self) -> bool {
        let mut socket = [PollFd::new(&self.socket, PollFlags::IN)];
        poll(&mut socket, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Readable when it has spoken or died.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// In the daemon's PID namespace.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Gives an unpacker that writes its image's UUID: it has read the whole
    /// archive, and what it has read is right.
    ///
    /// # Errors
    /// Only of the socket.
    pub fn finish(&self, uuid: [u8; 16]) -> Result<(), Failure> {
        match write(&self.socket, &uuid) {
            // Its answer or its end tells more.
            Ok(_) | Err(rustix::io::Errno::PIPE) => Ok(()),
            Err(error) => Err(Failure::Pipe(error.into())),
        }
    }

    /// Waits until it has done its task, and ends it.
    ///
    /// # Errors
    /// It has not.
    pub fn wait(mut self, watch: &Watch<'_>, patience: Duration) -> Result<Done, Failure> {
        match self.word(watch, patience)? {
            Word::Done(done) => Ok(done),
            Word::Failed { fault, reason } => Err(Failure::Failed {
                fault,
                reason: plain(&reason),
            }),
            Word::Unread => Err(Failure::Unread),
            other @ Word::Ready { .. } => Err(nonsense(&other)),
        }
    }

    fn word(&mut self, watch: &Watch<'_>, patience: Duration) -> Result<Word, Failure> {
        watch.message(self.socket.as_fd(), patience)?;
        match packet::recv::<Word>(&self.socket) {
            Ok(Some(word)) => Ok(word),
            Ok(None) => Err(self.death()),
            Err(error) => Err(Failure::Nonsense(plain(&error.to_string()))),
        }
    }

    /// It has closed its socket, as its end does.
    fn death(&mut self) -> Failure {
        match self.end() {
            Ok(status) => Failure::Died {
                task: self.task,
                death: Death {
                    status,
                    last_words: self.last_words(),
                },
            },
            Err(error) => Failure::Pipe(error),
        }
    }

    /// Ends it if it has not ended, which changes nothing of how one did that
    /// has, and takes it off the list of processes.
    fn end(&mut self) -> io::Result<ExitStatus> {
        // One that was waited for has given its id back, and kill knows.
        self.child.kill()?;
        self.child.wait()
    }

    /// Of a process that has ended: nobody else can write there.
    fn last_words(&mut self) -> String {
        let mut words = Vec::new();
        let said = (&mut self.said).take(LAST_WORDS).read_to_end(&mut words);
        match said {
            Ok(_) => plain(&String::from_utf8_lossy(&words)),
            Err(error) => plain(&error.to_string()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Neither fails for a child of one's own.
        let _ended = self.end();
    }
}

fn nonsense(word: &Word) -> Failure {
    Failure::Nonsense(plain(&format!("{word:?}")))
}
