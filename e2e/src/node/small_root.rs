//! A root that is soon full, or can do more than others: a file system of the
//! test's own, where the server keeps what outlives it.

use std::fs::File;
use std::process::Command;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::Node;
use crate::output;

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

    /// Mounts a file system in which files can be cloned on the root of a server
    /// that was not started yet.
    pub fn mount_root_with_clones(&self) -> Result<()> {
        let disk = self.dir.join("root.btrfs");
        File::create(&disk)?.set_len(1 << 30)?;
        let (disk, root) = (
            disk.display().to_string(),
            self.root().display().to_string(),
        );
        run("mkfs.btrfs", &["-q", &disk])?;
        run("mount", &["-o", "loop", &disk, &root])
    }

    /// Like [`Self::finish`], for a node with a root of its own, which the server
    /// has to be off before it can go.
    pub fn finish_with_small_root(self) -> Result<()> {
        self.remove_all_pods()?;
        self.stop_server()?;
        umount2(&self.root(), MntFlags::empty()).context("unmount the small file system")?;
        self.start_server()?;
        self.finish()
    }
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output();
    let output = output.with_context(|| program.to_owned())?;
    output::of_success(program, args, &output).map(drop)
}
