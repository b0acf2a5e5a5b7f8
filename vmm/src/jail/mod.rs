//! The confinement of a pod's VMM, entered once, before any thread exists:
//! PID 1 of its namespace (made by the daemon), own mount, IPC and UTS
//! namespaces, the pod's network namespace, an almost empty root, the pod's
//! uid, and of root's capabilities only those that serving the shared
//! directory needs.

mod creds;
mod mounts;
pub mod user_ns;

#[cfg(test)]
pub(crate) use creds::KEPT;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use vmm_client::VmSpec;

/// Inside the jail: the directory that virtio-fs serves.
pub const SHARED_DIR: &str = "/shared";
/// Inside the jail: where the VMM binds its devices' sockets.
pub const RUN_DIR: &str = "/run";
/// Inside the jail: where UML keeps the guest's memory.
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
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step {
        step,
        source: source.into(),
    }
}

/// Enters the jail of `spec`. `netns` is the pod's; without one the VMM gets
/// an empty one.
pub fn enter(spec: &VmSpec, netns: Option<OwnedFd>) -> Result<(), JailError> {
    umask(Mode::from_bits_retain(0o077));
    limits()?;
    oom_score();

    let own = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(own).map_err(step("unshare mount, IPC and UTS namespaces"))?;
    match netns {
        Some(netns) => setns(netns, CloneFlags::CLONE_NEWNET)
            .map_err(step("enter the pod's network namespace"))?,
        None => {
            unshare(CloneFlags::CLONE_NEWNET).map_err(step("unshare the network namespace"))?;
        }
    }
    mounts::pivot(spec)?;
    creds::drop_privileges(spec.uid, spec.gid)
}

fn limits() -> Result<(), JailError> {
    // A guest kernel's panic aborts its process: no image of it on the disk.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("limit core dumps"))?;
    // One descriptor for each of a guest's vsock connections and open files.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(step("read the file limit"))?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(step("raise the file limit"))
}

/// Pods do not inherit the daemon's protection from the OOM killer.
fn oom_score() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "0") {
        tracing::warn!(%error, "oom_score_adj cannot be set (no CAP_SYS_RESOURCE?)");
    }
}
