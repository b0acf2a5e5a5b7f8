//! What the holder does, in the order that matters: it leaves the node's files,
//! its rights and at last its descriptors behind, says that it is ready, and
//! then only reaps.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, RawFd};

use caps::{CapSet, errors::CapsError};
use drupe_agent::sys::close_range;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::{set_dumpable, set_name, set_no_new_privs};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{
    Gid, Uid, chdir, dup2_stderr, dup2_stdout, pivot_root, setgroups, setresgid, setresuid, setsid,
};
use rustix::process::{WaitOptions, wait};

use super::READY;

/// What the field's pause images run as.
const UID: u32 = 65_535;
/// After the standard streams.
const FIRST_OTHER: RawFd = 3;
/// Nothing is ever made in it.
const ROOT_OPTIONS: &str = "mode=555,size=4k,nr_inodes=1";
/// Where the empty root is mounted before it becomes the root: there is one
/// wherever this runs, and it is mounted on for nobody else.
const ROOT_AT: &str = "/proc";
const NONE: Option<&str> = None;

#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    #[error("holder of a PID namespace: cannot {step}")]
    Step {
        step: &'static str,
        source: io::Error,
    },
    #[error("holder of a PID namespace: cannot {step}")]
    Capabilities {
        step: &'static str,
        source: CapsError,
    },
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> HoldError {
    move |source| HoldError::Step {
        step,
        source: source.into(),
    }
}

/// Ends when standard input does.
pub fn hold() -> Result<(), HoldError> {
    // What others have left open on the way here: nothing of ours is yet.
    match close_range(FIRST_OTHER, RawFd::MAX) {
        // Before Linux 5.9; the daemon leaves nothing open.
        Ok(()) | Err(Errno::ENOSYS) => {}
        Err(errno) => return Err(step("close descriptors")(errno)),
    }
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block().map_err(step("block SIGCHLD"))?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&mask, flags).map_err(step("take signals"))?;
    setsid().map_err(step("leave the supervisor's session"))?;
    set_name(c"pause").map_err(step("set a name"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("limit core dumps"))?;
    leave_root()?;
    drop_privileges()?;
    say_ready()?;
    reap(&signals)
}

/// An own mount namespace with an empty root that cannot be written.
fn leave_root() -> Result<(), HoldError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(step("unshare the mount namespace"))?;
    let change = |flags| mount(NONE, "/", NONE, flags, NONE);
    change(MsFlags::MS_REC | MsFlags::MS_PRIVATE).map_err(step("make all mounts private"))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let tmpfs = Some("tmpfs");
    mount(tmpfs, ROOT_AT, tmpfs, flags, Some(ROOT_OPTIONS)).map_err(step("mount a tmpfs"))?;
    // Stacks the old root over the new one, from where it is taken off.
    chdir(ROOT_AT).map_err(step("change to the new root"))?;
    pivot_root(".", ".").map_err(step("pivot into the new root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the node's root"))?;
    chdir("/").map_err(step("change to the new root"))
}

fn drop_privileges() -> Result<(), HoldError> {
    let failed = |step| move |source| HoldError::Capabilities { step, source };
    for capability in caps::all() {
        // One that this kernel does not know is in no set.
        if caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) {
            caps::drop(None, CapSet::Bounding, capability).map_err(failed("limit capabilities"))?;
        }
    }
    let (uid, gid) = (Uid::from_raw(UID), Gid::from_raw(UID));
    setgroups(&[]).map_err(step("leave supplementary groups"))?;
    setresgid(gid, gid, gid).map_err(step("take an unprivileged gid"))?;
    setresuid(uid, uid, uid).map_err(step("take an unprivileged uid"))?;
    // The ambient set goes with the inheritable one. Effective before
    // permitted, within which it must stay.
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(failed("drop capabilities"))?;
    }
    set_no_new_privs().map_err(step("set no_new_privs"))?;
    // Nobody of the same uid reads or traces it either.
    set_dumpable(false).map_err(step("become undumpable"))
}

/// Keeps only standard input, the pipe that nothing comes through; the log's
/// place is taken by it as well.
fn say_ready() -> Result<(), HoldError> {
    let stdin = io::stdin();
    dup2_stderr(stdin.as_fd()).map_err(step("close the log"))?;
    let says = io::stdout().as_fd().try_clone_to_owned();
    let mut says = File::from(says.map_err(step("say that it is ready"))?);
    dup2_stdout(stdin.as_fd()).map_err(step("say that it is ready"))?;
    says.write_all(&[READY])
        .map_err(step("say that it is ready"))
}

fn reap(signals: &SignalFd) -> Result<(), HoldError> {
    let stdin = io::stdin();
    loop {
        let mut fds = [
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(step("wait")(errno)),
        }
        // Nothing is ever written: it is the end.
        if fds[0].any().unwrap_or(true) {
            return Ok(());
        }
        while let Ok(Some(_)) = signals.read_signal() {}
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
    }
}
