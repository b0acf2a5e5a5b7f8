//! The way of a new process from `clone3` to `execve`.
//!
//! Runs in the child, in a copy of the agent's memory: it carries out a
//! [`Plan`] and must not allocate, lock or panic. Every failure goes to the
//! parent as one packet that names the step; success closes the socket by
//! close-on-exec.

mod privileges;
mod root;
mod terminal;

use std::convert::Infallible;
use std::ffi::{CStr, c_int};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, setsid, write};

use super::plan::{Entry, Failure, Identity, Message, Plan, Program, Stdio, Step};
use crate::sys;
use privileges::{become_user, drop_privileges, set_limits};
use terminal::open_terminal;

type Result<T> = std::result::Result<T, Failure>;

/// Where the agent keeps an empty directory for a new root to sit on while it
/// is entered.
pub const PIVOT: &CStr = c"/run/drupe/pivot";

/// Exit code of a child that could not exec; the parent knows more by then.
const SETUP_FAILED: c_int = 127;

/// Highest capability this agent knows (CAP_CHECKPOINT_RESTORE).
pub const LAST_CAPABILITY: u32 = 40;

trait At<T> {
    fn at(self, step: Step, index: usize) -> Result<T>;
}

impl<T> At<T> for std::result::Result<T, Errno> {
    fn at(self, step: Step, index: usize) -> Result<T> {
        self.map_err(|errno| Failure {
            step,
            index: index as u32,
            errno,
        })
    }
}

/// Carries out `plan`; never returns.
pub fn run(plan: &Plan) -> ! {
    let Err(failure) = execute(plan);
    // The one descriptor beside 0 to 2 that stays open until `execve`.
    // Nobody is left to tell when the parent is gone.
    let _ = write(&plan.channel, &Message::Failed(failure).encode());
    // SAFETY: ends the process without running the parent's exit handlers.
    unsafe { libc::_exit(SETUP_FAILED) }
}

fn execute(plan: &Plan) -> Result<Infallible> {
    reset_signals();
    // Until `execve` this is a copy of the agent's memory, with what it knows
    // of other containers, in sight of this container's processes.
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Session, 1)?;
    setsid().at(Step::Session, 0)?;
    let identity = &plan.identity;
    // What takes rights in the guest was done by the go-between then.
    let inside = plan.user.is_some();
    if let Some(score) = identity.oom_score_adj.as_deref().filter(|_| !inside) {
        set_oom_score_adj(score).at(Step::OomScore, 0)?;
    }
    match &plan.entry {
        Entry::Create(root) => root::enter(root, matches!(plan.stdio, Stdio::Terminal { .. }))?,
        Entry::Join { pidfd, namespaces } if !inside => {
            sys::setns(pidfd.as_raw_fd(), *namespaces).at(Step::Join, 0)?;
        }
        Entry::Join { .. } => {}
    }
    let terminal = match &plan.stdio {
        Stdio::Files(files) => {
            for (number, file) in files.iter().enumerate() {
                duplicate(file.as_raw_fd(), number as RawFd).at(Step::Stdio, number)?;
            }
            None
        }
        Stdio::Terminal {
            rows,
            columns,
            console,
        } => Some(open_terminal(identity.uid, *rows, *columns, *console)?),
    };
    if let Entry::Create(root) = &plan.entry {
        // A directory that is missing has to be made while the root can be
        // written.
        enter_cwd(identity)?;
        root::restrict(root)?;
    }
    set_limits(identity)?;
    enter_cwd(identity)?;
    become_user(identity)?;
    close_others(
        plan.channel.as_raw_fd(),
        terminal.as_ref().map(AsRawFd::as_raw_fd),
    )
    .at(Step::Exec, 0)?;
    if plan.wait {
        wait_for_start(plan, terminal)?;
    }
    drop_privileges(identity)?;
    exec(&plan.program)
}

/// The agent ignores SIGPIPE as every Rust program does, and `execve` keeps
/// what is ignored.
fn reset_signals() {
    // SAFETY: sets default dispositions and an empty mask of this process.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Closes the agent's descriptors: a process that waits to be started would
/// hold up the mounts and connections of other containers.
fn close_others(channel: RawFd, terminal: Option<RawFd>) -> sys::Result<()> {
    let terminal = terminal.unwrap_or(channel);
    let mut first = 3;
    for keep in [channel.min(terminal), channel.max(terminal)] {
        if keep > first {
            sys::close_range(first, keep - 1)?;
        }
        first = first.max(keep + 1);
    }
    sys::close_range(first, RawFd::MAX)
}

/// `dup2` that also works, and clears close-on-exec, when both are the same.
fn duplicate(from: RawFd, to: RawFd) -> sys::Result<()> {
    let result = if from == to {
        // SAFETY: takes integers and closes nothing.
        unsafe { libc::fcntl(to, libc::F_SETFD, 0) }
    } else {
        // SAFETY: takes integers; 0 to 2 are owned by nothing in this process.
        unsafe { libc::dup2(from, to) }
    };
    Errno::result(result).map(drop)
}

/// An image's working directory that does not exist is made, as every runtime
/// does.
fn enter_cwd(identity: &Identity) -> Result<()> {
    let cwd = identity.cwd.as_c_str();
    match chdir(cwd) {
        Err(Errno::ENOENT) => {
            root::make_directories(cwd, 0o755).at(Step::Cwd, 0)?;
            chdir(cwd).at(Step::Cwd, 0)
        }
        result => result.at(Step::Cwd, 0),
    }
}

/// Tells the parent that all is set up, the terminal's master beside it, and
/// waits for its byte. The parent's death ends the wait and the process.
fn wait_for_start(plan: &Plan, terminal: Option<OwnedFd>) -> Result<()> {
    send_packet(
        plan.channel.as_raw_fd(),
        &Message::Ready.encode(),
        terminal.as_ref().map(AsRawFd::as_raw_fd),
    )
    .at(Step::Wait, 0)?;
    drop(terminal);
    let mut byte = [0u8; 1];
    match nix::unistd::read(&plan.channel, &mut byte) {
        Ok(1) => Ok(()),
        Ok(_) => Err(Errno::ECANCELED).at(Step::Wait, 1),
        Err(errno) => Err(errno).at(Step::Wait, 1),
    }
}

#[repr(C, align(8))]
struct ControlBuffer([u8; 32]);

/// One packet, with a descriptor beside it.
pub(super) fn send_packet(channel: RawFd, bytes: &[u8], fd: Option<RawFd>) -> sys::Result<()> {
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut control = ControlBuffer([0; 32]);
    // SAFETY: `msghdr` is plain data, for which zero is valid. The control
    // buffer is aligned for a header and holds one descriptor
    // (CMSG_SPACE(4) = 24); everything pointed at outlives the call.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        if let Some(fd) = fd {
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
        }
        Errno::result(libc::sendmsg(channel, &raw const message, 0)).map(drop)
    }
}

/// Tries each path as `execvp` does: one that is missing or not executable
/// does not end the search.
fn exec(program: &Program) -> Result<Infallible> {
    let mut error = Errno::ENOENT;
    for candidate in &program.candidates {
        // SAFETY: both arrays end with null and hold pointers to C strings
        // that live until the process image is replaced.
        unsafe {
            libc::execve(
                candidate.as_ptr(),
                program.argv.as_ptr(),
                program.envp.as_ptr(),
            );
        }
        match Errno::last() {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => error = Errno::EACCES,
            errno => {
                error = errno;
                break;
            }
        }
    }
    // A script or program that is there but whose interpreter is not.
    let there = |path: &&std::ffi::CString| {
        // SAFETY: a C string that lives.
        error == Errno::ENOENT && unsafe { libc::access(path.as_ptr(), libc::F_OK) } == 0
    };
    if program.candidates.iter().any(|path| there(&path)) {
        error = Errno::ELIBACC;
    }
    Err(error).at(Step::Exec, 0)
}

/// Lowering it needs CAP_SYS_RESOURCE, which PID 1 of a guest has.
pub(super) fn set_oom_score_adj(score: &CStr) -> sys::Result<()> {
    write_file(c"/proc/self/oom_score_adj", score)
}

fn write_file(path: &CStr, value: &CStr) -> sys::Result<()> {
    let file = open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    write(&file, value.to_bytes()).map(drop)
}
