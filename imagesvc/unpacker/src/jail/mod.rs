//! What an unpacker gives up before it looks at a layer: everything. Entered
//! once, before any thread exists.
//!
//! | what | is |
//! | --- | --- |
//! | user, group | the unpackers' own, without a capability, none to be had |
//! | namespaces | PID (made by the daemon), mount, network, IPC, UTS, control group |
//! | root | an empty file system that takes nothing |
//! | files | the pipes and files of the task, the daemon's socket |
//! | system calls | those of [`filter`], which open, make or reach nothing |
//! | memory, time, file length | those of the task |
//!
//! Each alone would do for most of what could go wrong; where the node's
//! kernel lacks a filter the others remain.

mod creds;
mod filter;
mod landlock;
mod limits;
mod root;

use std::fmt;
use std::fs;
use std::io;

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::sethostname;
use unpacker_client::{Fault, Missing, Order};

/// A pull can be done again, unlike a pod's work: of the node's memory an
/// unpacker's goes early.
const OOM_SCORE: &str = "500";

/// Why a process is not in its jail. It is not to go on.
#[derive(Debug)]
pub enum JailError {
    /// A step on the way did not succeed.
    Step {
        step: &'static str,
        source: io::Error,
    },
    /// The node's kernel lacks parts, and they are not to be done without.
    Lacking(Vec<Missing>),
}

impl JailError {
    /// Whose fault it is.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Step { .. } => Fault::Node,
            Self::Lacking(_) => Fault::Unconfined,
        }
    }
}

impl fmt::Display for JailError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step { step, source } => write!(f, "cannot {step}: {source}"),
            Self::Lacking(missing) => {
                let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
                write!(f, "the node's kernel lacks {}", names.join(", "))
            }
        }
    }
}

impl std::error::Error for JailError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // It stands in the text.
        None
    }
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step {
        step,
        source: source.into(),
    }
}

/// Which parts of the jail are wanted that not every kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filters {
    All,
    /// For tests of what holds without them.
    None,
}

/// Enters the jail; tells which parts of it the node's kernel lacks.
///
/// # Errors
/// A step does not succeed, or a part is lacking that is not to be done
/// without. The process is not to go on.
pub fn enter(order: &Order, filters: Filters) -> Result<Vec<Missing>, JailError> {
    fs::write("/proc/self/oom_score_adj", OOM_SCORE).map_err(step("set oom_score_adj"))?;
    let own = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(own).map_err(step("leave the node's namespaces"))?;
    sethostname("unpacker").map_err(step("name its host"))?;
    root::pivot()?;
    creds::drop_all(order.uid, order.gid)?;
    // Reset by each change of credentials, so behind all of them.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("end with the daemon"))?;
    prctl::set_dumpable(false).map_err(step("keep its memory from others"))?;
    let mut missing = Vec::new();
    if filters == Filters::All {
        missing.extend(landlock::restrict()?);
    }
    limits::set(&order.bounds)?;
    if filters == Filters::All && !filter::install()? {
        missing.push(Missing::Seccomp);
    }
    if order.strict && !missing.is_empty() {
        return Err(JailError::Lacking(missing));
    }
    Ok(missing)
}
