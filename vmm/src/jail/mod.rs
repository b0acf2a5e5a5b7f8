//! The confinement of a pod's processes on the node, each entered once, before
//! any thread of the process exists.
//!
//! | | monitor | file server |
//! | --- | --- | --- |
//! | root | a tmpfs with next to nothing in it | the pod's shared directory |
//! | ids | the pod's | effective and saved root's, real the pod's |
//! | capabilities | none | what serving files takes |
//! | namespaces | PID (made by the daemon), mount, IPC, UTS, network, cgroup | the monitor's PID; others of its own |
//!
//! Both have an empty network namespace, a session keyring of their own and
//! `no_new_privs`, and nobody of the same uid may look into them.

mod creds;
mod devices;
mod landlock;
mod mounts;
pub mod user_ns;

pub use creds::OF_FILE_SERVER;
pub use devices::refuse_devices;
use landlock::Enforced;

use std::fs::{self, File};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use vmm_client::{Confinement, VmSpec};

use crate::confinement::{Lacking, go_without};
use crate::files::FilesSpec;

/// Inside the monitor's jail: where it binds its devices' sockets.
pub const RUN_DIR: &str = "/run";
/// There too: where UML keeps the guest's memory.
pub const TMP_DIR: &str = "/tmp";
pub const URANDOM: &str = "/dev/urandom";

#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("jail: {step}")]
    Step {
        step: &'static str,
        source: io::Error,
    },
    #[error("jail: {step} {path}")]
    Path {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "jail: {path} is not on a shared mount, so volumes mounted later would not reach the guest"
    )]
    NotShared { path: PathBuf },
    #[error(transparent)]
    Lacking(#[from] Lacking),
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step {
        step,
        source: source.into(),
    }
}

/// Enters the monitor's jail. The guest's kernel and initramfs are what it may
/// still have run and read.
pub fn enter(
    spec: &VmSpec,
    kernel: BorrowedFd<'_>,
    initramfs: BorrowedFd<'_>,
) -> Result<(), JailError> {
    umask(Mode::from_bits_retain(0o077));
    // One descriptor for each of a guest's vsock connections and open files.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(step("read the file limit"))?;
    limits(hard)?;
    oom_score();
    own_namespaces()?;
    mounts::pivot(spec)?;
    creds::become_the_pod(spec.uid, spec.gid)?;
    let enforced = landlock::restrict_monitor(spec.machine, kernel, initramfs)?;
    settle(enforced, spec.confinement)
}

/// Whether so much of Landlock does.
fn settle(enforced: Enforced, wanted: Confinement) -> Result<(), JailError> {
    match enforced.lacks() {
        Some(lacks) => Ok(go_without(wanted, lacks)?),
        None => Ok(()),
    }
}

/// What the file server has in its jail.
pub struct FileServerJail {
    /// Its own /proc/self/fd, which is not to be found there.
    pub own_fds: File,
    /// Descriptors that it may have.
    pub files: u64,
}

/// Enters the file server's jail, in which it has `files` descriptors where the
/// node lets it.
pub fn enter_as_file_server(spec: &FilesSpec, files: u64) -> Result<FileServerJail, JailError> {
    // Modes of files are the guest's to say.
    umask(Mode::empty());
    let files = limits(files)?;
    own_namespaces()?;
    let own_fds = mounts::own_fds()?;
    mounts::pivot_into(&spec.shared_dir, &spec.root)?;
    creds::become_the_file_server(spec.uid, spec.gid)?;
    settle(landlock::restrict_file_server()?, spec.confinement)?;
    Ok(FileServerJail { own_fds, files })
}

fn own_namespaces() -> Result<(), JailError> {
    let own = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(own).map_err(step("unshare namespaces"))
}

/// The descriptors that there may be: `files`, or fewer.
fn limits(files: u64) -> Result<u64, JailError> {
    // A guest kernel's panic aborts its process: no image of it on the disk.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("limit core dumps"))?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(step("read the file limit"))?;
    let files = files.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, files, files).map_err(step("set the file limit"))?;
    Ok(files)
}

/// Pods do not inherit the daemon's protection from the OOM killer.
fn oom_score() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "0") {
        tracing::warn!(%error, "oom_score_adj cannot be set (no CAP_SYS_RESOURCE?)");
    }
}
