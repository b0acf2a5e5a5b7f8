//! What containerd keeps outside of the directories it is given.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

/// Removes the sockets of shims that were killed. Each is named in the
/// directory of its task, below containerd's state directory.
pub(super) fn remove_shim_sockets(state: &Path) -> Result<()> {
    let tasks = state.join("io.containerd.runtime.v2.task/k8s.io");
    let entries = match fs::read_dir(&tasks) {
        // Of another runtime, or without any task.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| tasks.display().to_string())?,
    };
    for entry in entries {
        let file = entry?.path().join("address");
        let address = match fs::read_to_string(&file) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            address => address.with_context(|| file.display().to_string())?,
        };
        let Some(socket) = address.trim().strip_prefix("unix://") else {
            continue;
        };
        match fs::remove_file(socket) {
            // Containers of a pod share one shim.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            removed => removed.with_context(|| socket.to_owned())?,
        }
    }
    Ok(())
}
