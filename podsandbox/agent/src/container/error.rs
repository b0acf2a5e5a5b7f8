//! What can go wrong with a container.

use super::attach::MAX_ATTACHED;
use super::command::MAX_EXECS;
use super::devices::DeviceError;
use super::launch::LaunchError;
use super::mounts::MountError;
use super::node_devices::NodeDeviceError;
use super::seccomp::SeccompError;
use super::session::SessionError;
use super::spec::SpecError;
use super::stdio::StdioError;
use super::user::UserError;
use super::{MAX_CONTAINERS, create, tee};
use crate::cgroup::CgroupError;
use crate::rootfs::RootfsError;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{id:?} is no container id")]
    Id { id: String },
    #[error("container {id} already exists")]
    Exists { id: String },
    #[error("container {id} does not exist")]
    Unknown { id: String },
    #[error("container {id} is {phase}, not {wanted}")]
    Phase {
        id: String,
        phase: &'static str,
        wanted: &'static str,
    },
    #[error("{signal} is no signal")]
    Signal { signal: u32 },
    #[error("cannot send signal {signal} to container {id}")]
    Send {
        id: String,
        signal: u32,
        source: std::io::Error,
    },
    #[error("the pod has {MAX_CONTAINERS} containers")]
    TooMany,
    #[error("the guest runs {MAX_EXECS} commands already")]
    TooManyExecs,
    #[error("{MAX_ATTACHED} clients are attached to the pod's containers already")]
    TooManyAttached,
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("the client took no output of container {id} for {} s", tee::STALL.as_secs())]
    TooSlow { id: String },
    #[error("the pod was not configured")]
    NotConfigured,
    #[error("the container was not set up in {} s", create::SETUP_TIMEOUT.as_secs())]
    SetupTimeout,
    #[error("the resources are not valid")]
    Resources(#[source] serde_json::Error),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Devices(#[from] DeviceError),
    #[error(transparent)]
    NodeDevices(#[from] NodeDeviceError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("cannot watch container {id} for OOM kills")]
    Oom { id: String, source: std::io::Error },
    #[error(
        "{what} {id} of the process is not one of the {length} that the pod's user namespace has"
    )]
    Unmapped {
        what: &'static str,
        id: u32,
        length: u32,
    },
    #[error("a task of the agent has failed")]
    Task(#[from] tokio::task::JoinError),
}
