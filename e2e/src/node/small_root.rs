//! A root that is soon full: a small file system of the test's own, where the
//! server keeps what outlives it.

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::Node;

impl Node {
    /// Mounts a file system of `size`, as tmpfs(5) takes it, on the root of a
    /// server that was not started yet.
    pub fn mount_small_root(&self, size: &str) -> Result<()> {
        mount(
            Some("tmpfs"),
            &self.root(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some(format!("size={size},mode=700").as_str()),
        )
        .context("mount a small file system")
    }

    /// Like [`Self::finish`], for a node with a small root, which the server
    /// has to be off before it can go.
    pub fn finish_with_small_root(self) -> Result<()> {
        self.remove_all_pods()?;
        self.stop_server()?;
        umount2(&self.root(), MntFlags::empty()).context("unmount the small file system")?;
        self.start_server()?;
        self.finish()
    }
}
