//! What containerd keeps outside of the directories it is given.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Node;

/// Where its shims listen. Each socket is named in the directory of its task,
/// below containerd's state directory; containers of a pod share one.
pub fn shim_sockets(state: &Path) -> Result<Vec<PathBuf>> {
    let tasks = state.join("io.containerd.runtime.v2.task/k8s.io");
    let mut sockets = Vec::new();
    let entries = match fs::read_dir(&tasks) {
        // Of another runtime, or without any task.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(sockets),
        entries => entries.with_context(|| tasks.display().to_string())?,
    };
    for entry in entries {
        let file = entry?.path().join("address");
        let address = match fs::read_to_string(&file) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            address => address.with_context(|| file.display().to_string())?,
        };
        sockets.extend(address.trim().strip_prefix("unix://").map(PathBuf::from));
    }
    sockets.sort();
    sockets.dedup();
    Ok(sockets)
}

/// Removes the sockets of shims that were killed.
pub(super) fn remove_shim_sockets(state: &Path) -> Result<()> {
    for socket in shim_sockets(state)? {
        match fs::remove_file(&socket) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            removed => removed.with_context(|| socket.display().to_string())?,
        }
    }
    Ok(())
}

impl Node {
    /// Has containerd look for the images of every registry at `url`.
    pub fn mirror_all_registries(&self, url: &str) -> Result<()> {
        let dir = self.dir.join("certs.d/_default");
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let hosts = format!("[host.\"{url}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
        fs::write(dir.join("hosts.toml"), hosts).context("hosts.toml")
    }
}
