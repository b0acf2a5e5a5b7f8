//! What containers and the guest use, read where the kernel keeps it.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_api::{ContainerStats, GuestStats, InterfaceStats, StatsRequest, StatsResponse};
use nix::sys::statvfs::statvfs;
use tokio::time::timeout;

use crate::cgroup::{self, CgroupError, Usage};
use crate::clock;
use crate::container::{Container, Containers};
use crate::rootfs::SCRATCH;
use crate::tree::{self, Size};

/// How long a request for statistics waits for a new measurement of a writable
/// layer; a larger one is answered with the number before.
const MEASURE_PATIENCE: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot read {path}")]
    Read {
        path: &'static str,
        source: io::Error,
    },
}

pub async fn collect(
    containers: &Containers,
    request: &StatsRequest,
) -> Result<StatsResponse, StatsError> {
    // One that has just gone is left out.
    let asked: Vec<Arc<Container>> = if request.container_ids.is_empty() {
        containers.all()
    } else {
        let get = |id: &String| containers.get(id).ok();
        request.container_ids.iter().filter_map(get).collect()
    };
    let mut response = StatsResponse {
        containers: Vec::with_capacity(asked.len()),
        guest: Some(guest()?),
        time_unix_nanos: clock::now_nanos(),
    };
    for container in asked {
        match of_container(&container).await {
            Ok(stats) => response.containers.push(stats),
            // The others' figures are as good as before.
            Err(error) => eprintln!("drupe-agent: container {}: {error}", container.id()),
        }
    }
    Ok(response)
}

async fn of_container(container: &Container) -> Result<ContainerStats, StatsError> {
    let usage = container.cgroup().usage()?;
    let layer = container.fs_usage.get().await;
    Ok(container_stats(container.id(), usage, layer))
}

/// What a container's cgroup and its writable layer say.
#[must_use]
pub fn container_stats(id: &str, usage: Usage, layer: Size) -> ContainerStats {
    ContainerStats {
        id: id.to_owned(),
        cpu_usage_nanos: usage.cpu_nanos,
        memory_usage_bytes: usage.memory,
        memory_working_set_bytes: usage.working_set,
        memory_rss_bytes: usage.rss,
        memory_page_faults: usage.page_faults,
        memory_major_page_faults: usage.major_page_faults,
        memory_limit_bytes: usage.memory_limit,
        pids: usage.pids,
        fs_used_bytes: layer.bytes,
        fs_inodes_used: layer.inodes,
        swap_usage_bytes: usage.swap,
        cpu_user_nanos: usage.cpu_user_nanos,
        cpu_system_nanos: usage.cpu_system_nanos,
        cpu_periods: usage.cpu_periods,
        cpu_throttled_periods: usage.cpu_throttled_periods,
        cpu_throttled_nanos: usage.cpu_throttled_nanos,
        cpu_pressure: usage.pressures.cpu,
        memory_pressure: usage.pressures.memory,
        io_pressure: usage.pressures.io,
        memory_file_bytes: usage.file,
        memory_mapped_file_bytes: usage.mapped_file,
        memory_kernel_bytes: usage.kernel,
        memory_peak_bytes: usage.memory_peak,
        memory_limit_hits: usage.limit_hits,
        oom_kills: usage.oom_kills,
        pids_limit: usage.pids_limit,
        processes: usage.processes,
        disks: usage.disks,
    }
}

fn guest() -> Result<GuestStats, StatsError> {
    let meminfo = read("/proc/meminfo")?;
    let pressures = cgroup::pod_pressures()?;
    let scratch = statvfs(SCRATCH).map_err(|errno| StatsError::Read {
        path: SCRATCH,
        source: errno.into(),
    })?;
    Ok(GuestStats {
        cpu_usage_nanos: cgroup::guest_cpu_nanos()?,
        memory_total_bytes: meminfo_bytes(&meminfo, "MemTotal"),
        memory_available_bytes: meminfo_bytes(&meminfo, "MemAvailable"),
        process_count: cgroup::pod_tasks()?,
        interfaces: interfaces(&read("/proc/net/dev")?),
        agent_rss_bytes: rss(&read("/proc/self/statm")?),
        cpu_pressure: pressures.cpu,
        memory_pressure: pressures.memory,
        io_pressure: pressures.io,
        scratch_bytes: scratch.blocks().saturating_mul(scratch.fragment_size()),
        scratch_inodes: scratch.files(),
        scratch_free_inodes: scratch.files_free(),
    })
}

fn read(path: &'static str) -> Result<String, StatsError> {
    fs::read_to_string(path).map_err(|source| StatsError::Read { path, source })
}

pub fn meminfo_bytes(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| {
            let value = line.strip_prefix(name)?.strip_prefix(':')?.trim();
            value.strip_suffix("kB")?.trim().parse::<u64>().ok()
        })
        .unwrap_or(0)
        .saturating_mul(1024)
}

/// /proc/net/dev, without the loopback.
pub fn interfaces(text: &str) -> Vec<InterfaceStats> {
    text.lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let name = name.trim();
            let counters: Vec<u64> = counters
                .split_whitespace()
                .map_while(|field| field.parse().ok())
                .collect();
            let counter = |index: usize| counters.get(index).copied().unwrap_or(0);
            (name != "lo" && counters.len() >= 16).then(|| InterfaceStats {
                name: name.to_owned(),
                rx_bytes: counter(0),
                rx_packets: counter(1),
                rx_errors: counter(2),
                rx_dropped: counter(3),
                tx_bytes: counter(8),
                tx_packets: counter(9),
                tx_errors: counter(10),
                tx_dropped: counter(11),
            })
        })
        .collect()
}

/// Resident pages, the second field of statm, in bytes.
pub fn rss(statm: &str) -> u64 {
    const PAGE: u64 = 4096;
    let pages = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0).saturating_mul(PAGE)
}

#[derive(Debug, Default)]
struct Measured {
    size: Size,
    /// Free blocks and inodes of the scratch disk when it was measured: while
    /// they stay, nothing was written.
    free: Option<(u64, u64)>,
    running: bool,
}

/// The size of a writable layer, measured again only after something was
/// written to the scratch disk.
#[derive(Debug)]
pub struct FsUsage {
    upper: PathBuf,
    /// A file or directory of the file system that it is on.
    disk: PathBuf,
    measured: Arc<Mutex<Measured>>,
}

impl FsUsage {
    pub fn new(upper: PathBuf, disk: PathBuf) -> Self {
        Self {
            upper,
            disk,
            measured: Arc::default(),
        }
    }

    pub async fn get(&self) -> Size {
        let lock = |measured: &Arc<Mutex<Measured>>, change: &mut dyn FnMut(&mut Measured)| {
            // Every change is one of independent assignments.
            change(&mut measured.lock().unwrap_or_else(PoisonError::into_inner));
        };
        let free = statvfs(&self.disk)
            .ok()
            .map(|s| (s.blocks_free(), s.files_free()));
        let (mut size, mut measure) = (Size::default(), false);
        lock(&self.measured, &mut |measured| {
            size = measured.size;
            measure = !measured.running && (measured.free.is_none() || measured.free != free);
            measured.running |= measure;
        });
        if !measure {
            return size;
        }
        let (upper, measured) = (self.upper.clone(), self.measured.clone());
        let task = tokio::spawn(async move {
            let result = tree::measure(upper).await;
            let mut new = None;
            lock(&measured, &mut |measured| {
                measured.running = false;
                if let Ok(size) = &result {
                    measured.size = *size;
                    measured.free = free;
                    new = Some(*size);
                }
            });
            if let Err(error) = result {
                eprintln!("drupe-agent: cannot measure a writable layer: {error}");
            }
            new
        });
        match timeout(MEASURE_PATIENCE, task).await {
            Ok(Ok(Some(new))) => new,
            _ => size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_their_columns() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  \
            eth0: 1000 10 3 5 0 0 0 0 2000 20 4 6 0 0 0 0\n";
        assert_eq!(
            interfaces(text),
            [InterfaceStats {
                name: "eth0".into(),
                rx_bytes: 1000,
                rx_errors: 3,
                tx_bytes: 2000,
                tx_errors: 4,
                rx_packets: 10,
                rx_dropped: 5,
                tx_packets: 20,
                tx_dropped: 6,
            }]
        );
    }

    #[test]
    fn memory_is_in_bytes() {
        let text = "MemTotal:         253952 kB\nMemFree: 1 kB\nMemAvailable:     200000 kB\n";
        assert_eq!(meminfo_bytes(text, "MemTotal"), 253_952 * 1024);
        assert_eq!(meminfo_bytes(text, "MemAvailable"), 200_000 * 1024);
        assert_eq!(rss("1000 500 100 1 0 1 0\n"), 500 * 4096);
    }
}
