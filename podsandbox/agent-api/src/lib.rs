//! The gRPC interface between the daemon and the agent in the guest, as
//! generated from `proto/agent.proto`, and the bounds both sides keep to.
#![forbid(unsafe_code)]

pub mod bounds;
pub mod codec;
pub mod stream;

tonic::include_proto!("drupe.agent.v1");

/// Largest gRPC message that an agent takes; an OCI runtime spec is tens of KiB.
/// What a daemon takes is bounded by each call of its own.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// RPCs under way on one connection: a session is one for as long as it lasts,
/// and hundreds of them leave room for everything else.
pub const MAX_CALLS: u32 = 2048;

/// Where the agent mounts the pod's shared directory (virtio-fs tag
/// [`SHARED_TAG`]); bind mount sources in OCI specs lie below it.
pub const SHARED_DIR: &str = "/run/drupe/shared";
pub const SHARED_TAG: &str = "shared";

/// Serial (virtio-blk id) of the pod's scratch disk.
pub const SCRATCH_SERIAL: &str = "scratch";

/// Serial of image disk slot `slot`.
#[must_use]
pub fn image_serial(slot: u32) -> String {
    format!("image{slot}")
}

/// Before the id of the container whose PID namespace is joined, in place of a
/// namespace's path.
pub const PID_OF: &str = "container:";

/// The PID namespace of the guest itself, in which the agent is, as a spec names
/// it.
pub const GUEST_PIDS: &str = "/proc/1/ns/pid";

/// For a pod on the host's kernel: the PID namespace that the pod's containers
/// share. Without a PID namespace in its spec a container there has the host's.
pub const PID_OF_POD: &str = "pod";

/// In the directory of such a pod: the files of /etc that its containers get.
pub const POD_ETC: &str = "etc";

/// In a container's bundle: a link to the directory that takes what it writes.
pub const UPPER_LINK: &str = "upper";

/// The longest text of an error that an agent tells, in bytes.
pub const MAX_ERROR_BYTES: usize = 2048;

/// Cuts the text of an error to [`MAX_ERROR_BYTES`]: it may quote a command line
/// of megabytes.
#[must_use]
pub fn brief(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_ERROR_BYTES));
    text
}
