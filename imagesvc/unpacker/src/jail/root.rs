//! A root without anything in it, and nothing beside it.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

use super::{JailError, step};

/// A directory that every node has; in this namespace nobody needs it.
const PLACE: &str = "/proc";
const NONE: Option<&str> = None;

pub(super) fn pivot() -> Result<(), JailError> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .map_err(step("make all mounts private"))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = Some("mode=0555,size=4k,nr_inodes=1");
    mount(Some("empty"), PLACE, Some("tmpfs"), flags, options)
        .map_err(step("make an empty root"))?;
    // Stacks the old root over the new one, from where it is taken off.
    chdir(PLACE).map_err(step("change to its root"))?;
    pivot_root(".", ".").map_err(step("pivot into its root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the node's root"))?;
    chdir("/").map_err(step("change to its root"))
}
