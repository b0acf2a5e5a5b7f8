//! What the kernel lets it take.

use nix::sys::resource::{Resource, setrlimit};
use unpacker_client::Bounds;

use super::{JailError, step};

pub(super) fn set(bounds: &Bounds) -> Result<(), JailError> {
    for (resource, limit) in [
        (Resource::RLIMIT_AS, bounds.memory_bytes),
        (Resource::RLIMIT_FSIZE, bounds.file_bytes),
        (Resource::RLIMIT_CPU, bounds.cpu_seconds),
        // No image of it on the disk.
        (Resource::RLIMIT_CORE, 0),
        // None beyond those it has.
        (Resource::RLIMIT_NOFILE, 0),
        (Resource::RLIMIT_NPROC, 0),
        (Resource::RLIMIT_MEMLOCK, 0),
        (Resource::RLIMIT_MSGQUEUE, 0),
    ] {
        setrlimit(resource, limit, limit).map_err(step("limit itself"))?;
    }
    Ok(())
}
