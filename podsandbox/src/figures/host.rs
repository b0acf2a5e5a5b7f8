//! What the node knows of a pod with a machine.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::cgroup::{self, Charge};
use crate::process::Process;
use crate::record::PodRecord;

/// `st_blocks` counts in these, whatever the file system's own are.
const BLOCK: u64 = 512;

/// What cannot be read is not known: it bounds nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) charge: Option<Charge>,
    /// Memory of the guest's in pages that the node has set aside: no group is
    /// charged for it.
    pub(super) huge_bytes: u64,
    pub(super) scratch: Option<Disk>,
}

/// The disk that the containers write to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Disk {
    /// What it takes on the node.
    pub(super) allocated: u64,
    pub(super) size: u64,
}

impl Host {
    pub(super) fn read(pod: &PodRecord, scratch: &Path) -> Self {
        Self {
            charge: charge(pod),
            huge_bytes: huge_bytes(pod).unwrap_or(0),
            scratch: fs::metadata(scratch).ok().map(|metadata| Disk {
                allocated: metadata.blocks().saturating_mul(BLOCK),
                size: metadata.len(),
            }),
        }
    }

    /// All of the guest's memory that is the node's, and the monitor's beside it.
    pub(super) fn memory(&self) -> Option<u64> {
        let charge = self.charge?.memory_bytes;
        Some(charge.saturating_add(self.huge_bytes))
    }
}

fn charge(pod: &PodRecord) -> Option<Charge> {
    cgroup::charge(pod.cgroup.as_deref()?, &pod.id).unwrap_or_else(|error| {
        tracing::warn!(pod = %pod.id, error = %error.sentence(), "cannot tell what the pod costs");
        None
    })
}

fn huge_bytes(pod: &PodRecord) -> Option<u64> {
    let pid = pod.vmm_pid?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("HugetlbPages:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    // It may be another's by now.
    (kib > 0 && Process::open(pid, &pod.id).is_some()).then_some(kib.saturating_mul(1024))
}
