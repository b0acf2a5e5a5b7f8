//! The guest's figures within the node's. Pure.
//!
//! * Counters never fall, and CPU times of containers together grow no more
//!   than the pod's does.
//! * No container has more memory than the pod holds on the node, or than its
//!   limit; nor have all of them together.
//! * What the pod's disk takes on the node beyond what containers say they have
//!   written is theirs as well, once it has lasted. It is what limits of
//!   ephemeral storage and evictions for want of disk go by. Memory below what
//!   the node counts is not added to containers: it is the guest's kernel and
//!   its cache, and evictions for want of memory go by the pod.
//! * A guest that does not answer, or leaves a container out, has said what it
//!   said before.

use std::collections::BTreeMap;
use std::time::Duration;

use agent_api::{
    ContainerStats, DiskStats, GuestStats, InterfaceStats, Pressure, PressureData, StatsResponse,
};
use tokio::time::Instant;
use vmm_client::plain_within;

use super::host::Host;
use super::{Figures, PodFigures};

/// Beyond any count of bytes or events: thousands of them can be summed up, and
/// a float has each.
const MAX_COUNT: u64 = 1 << 53;
/// 36 years.
const MAX_NANOS: u64 = 1 << 60;
/// Linux has no more.
const MAX_TASKS: u64 = 1 << 22;
/// The guest can claim any number; a pod has one interface, and what its
/// containers add, and some thirty disks.
const MAX_INTERFACES: usize = 16;
const MAX_DISKS: usize = 64;
/// `IFNAMSIZ` less the null byte; serials of disks are shorter.
const MAX_NAME: usize = 15;
/// ext4's smallest block: a disk has no more inodes than blocks.
const MIN_BLOCK: u64 = 4096;

/// What a disk takes for itself and has not given back yet: the file system's
/// own blocks, and what was deleted. At least so much, and this part of it.
const DISK_SLACK: u64 = 64 << 20;
const DISK_SLACK_PART: u64 = 16;
/// Deleting a layer takes a while, and so does giving its blocks back.
const LASTS: Duration = Duration::from_secs(60);

/// What the pod is.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    /// What its machine was started with, and what the guest is to have of it.
    pub(super) machine_bytes: u64,
    pub(super) memory_bytes: u64,
    /// Ids of containers that run, with their memory limits.
    pub(super) containers: Vec<(String, Option<u64>)>,
}

/// What was told of a pod before.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    guest: GuestStats,
    containers: BTreeMap<String, ContainerStats>,
    cpu: Option<Credit>,
    unexplained: Lasting,
}

/// CPU time that the pod has had and its containers have not told of.
#[derive(Debug)]
struct Credit {
    pod_nanos: u64,
    left: u64,
}

impl Seen {
    pub(super) fn bounded(
        &mut self,
        said: Option<&StatsResponse>,
        host: &Host,
        pod: &Facts,
        now: Instant,
    ) -> Figures {
        if let Some(guest) = said.and_then(|said| said.guest.as_ref()) {
            self.guest = guest_stats(guest, host, pod);
        }
        let mut containers = BTreeMap::new();
        for (id, limit) in &pod.containers {
            let new = said.and_then(|said| said.containers.iter().find(|of| of.id == *id));
            let before = self.containers.get(id);
            let stats = match new {
                Some(new) => container_stats(new, before, host, pod, *limit),
                // What was added of the disk is added anew.
                None => match before {
                    Some(before) => before.clone(),
                    None => continue,
                },
            };
            containers.insert(id.clone(), stats);
        }
        self.share_cpu(&mut containers, host);
        if let Some(memory) = host.memory() {
            share(&mut containers, memory, |of| {
                &mut of.memory_working_set_bytes
            });
            share(&mut containers, memory, |of| &mut of.memory_usage_bytes);
            for of in containers.values_mut() {
                of.memory_working_set_bytes =
                    of.memory_working_set_bytes.min(of.memory_usage_bytes);
            }
        }
        if let Some(disk) = host.scratch {
            share(&mut containers, disk.size, |of| &mut of.fs_used_bytes);
        }
        self.containers.clone_from(&containers);
        self.add_unexplained(&mut containers, host, pod, now);
        Figures {
            answered: said.is_some(),
            pod: pod_figures(host, &self.guest, pod),
            guest: self.guest.clone(),
            containers,
            charge: host.charge,
        }
    }

    /// Containers get what they say as far as the pod has had it.
    fn share_cpu(&mut self, containers: &mut BTreeMap<String, ContainerStats>, host: &Host) {
        let Some(pod_nanos) = host.charge.map(|charge| charge.cpu_nanos) else {
            return;
        };
        let known = |id: &String| self.containers.get(id).map_or(0, |of| of.cpu_usage_nanos);
        let mut told = 0u64;
        for (id, of) in containers.iter_mut() {
            of.cpu_usage_nanos = of.cpu_usage_nanos.min(pod_nanos).max(known(id));
            told = told.saturating_add(of.cpu_usage_nanos - known(id));
        }
        let left = match &self.cpu {
            Some(credit) => {
                let earned = pod_nanos.saturating_sub(credit.pod_nanos);
                let left = credit.left.saturating_add(earned);
                if told > left {
                    for (id, of) in containers.iter_mut() {
                        let more = part(of.cpu_usage_nanos - known(id), left, told);
                        of.cpu_usage_nanos = known(id) + more;
                    }
                }
                left.saturating_sub(told)
            }
            // The daemon before this one may have told as much of each.
            None => pod_nanos.saturating_sub(told),
        };
        self.cpu = Some(Credit { pod_nanos, left });
        for (id, of) in containers {
            let before = self.containers.get(id);
            let before = before.map_or((0, 0), |of| (of.cpu_user_nanos, of.cpu_system_nanos));
            let system = of.cpu_system_nanos.min(of.cpu_usage_nanos);
            let user = of.cpu_user_nanos.min(of.cpu_usage_nanos - system);
            (of.cpu_user_nanos, of.cpu_system_nanos) = (user.max(before.0), system.max(before.1));
        }
    }

    fn add_unexplained(
        &mut self,
        containers: &mut BTreeMap<String, ContainerStats>,
        host: &Host,
        pod: &Facts,
        now: Instant,
    ) {
        let Some(disk) = host.scratch else { return };
        let told = sum(containers, |of| of.fs_used_bytes);
        let slack = DISK_SLACK.max(disk.allocated / DISK_SLACK_PART);
        let found = disk.allocated.saturating_sub(told.saturating_add(slack));
        let lasting = self.unexplained.lowest(found, now);
        if lasting == 0 {
            return;
        }
        for (id, _) in &pod.containers {
            let silent = || ContainerStats {
                id: id.clone(),
                ..ContainerStats::default()
            };
            containers.entry(id.clone()).or_insert_with(silent);
        }
        let count = containers.len() as u64;
        for of in containers.values_mut() {
            let more = match told {
                0 => lasting / count,
                told => part(of.fs_used_bytes, lasting, told),
            };
            of.fs_used_bytes = of.fs_used_bytes.saturating_add(more);
        }
    }
}

/// The lowest that was seen for a whole [`LASTS`].
#[derive(Debug, Default)]
struct Lasting {
    since: Option<Instant>,
    lowest: u64,
    before: u64,
}

impl Lasting {
    fn lowest(&mut self, found: u64, now: Instant) -> u64 {
        match self.since {
            Some(since) if now.duration_since(since) < LASTS => {
                self.lowest = self.lowest.min(found);
            }
            since => {
                self.before = since.map_or(0, |_| self.lowest);
                (self.since, self.lowest) = (Some(now), found);
            }
        }
        self.before.min(self.lowest)
    }
}

/// `whole * numerator / denominator`, which is not 0.
fn part(whole: u64, numerator: u64, denominator: u64) -> u64 {
    let part = u128::from(whole) * u128::from(numerator) / u128::from(denominator);
    u64::try_from(part).unwrap_or(u64::MAX)
}

fn sum(containers: &BTreeMap<String, ContainerStats>, of: fn(&ContainerStats) -> u64) -> u64 {
    containers.values().map(of).fold(0, u64::saturating_add)
}

/// Takes from each in proportion until all together are `most`.
fn share(
    containers: &mut BTreeMap<String, ContainerStats>,
    most: u64,
    figure: fn(&mut ContainerStats) -> &mut u64,
) {
    let all = containers.values_mut().map(|of| *figure(of));
    let all = all.fold(0, u64::saturating_add);
    if all > most {
        for of in containers.values_mut() {
            let figure = figure(of);
            *figure = part(*figure, most, all);
        }
    }
}

fn pod_figures(host: &Host, guest: &GuestStats, pod: &Facts) -> PodFigures {
    // Without the node's figures there are the guest's, which are bounded.
    let used = guest
        .memory_total_bytes
        .saturating_sub(guest.memory_available_bytes);
    let (usage, working_set, cpu_nanos) = match host.charge {
        Some(charge) => (
            charge.usage_bytes.saturating_add(host.huge_bytes),
            charge.working_set_bytes.saturating_add(host.huge_bytes),
            charge.cpu_nanos,
        ),
        None => (used, used, guest.cpu_usage_nanos),
    };
    PodFigures {
        cpu_nanos,
        memory_usage_bytes: usage,
        memory_working_set_bytes: working_set,
        memory_available_bytes: pod.memory_bytes.saturating_sub(working_set),
        tasks: host
            .charge
            .and_then(|charge| charge.tasks)
            .unwrap_or(guest.process_count),
    }
}

fn container_stats(
    said: &ContainerStats,
    before: Option<&ContainerStats>,
    host: &Host,
    pod: &Facts,
    limit: Option<u64>,
) -> ContainerStats {
    let none = ContainerStats::default();
    let before = before.unwrap_or(&none);
    let machine = pod.machine_bytes;
    let most = host
        .memory()
        .unwrap_or(machine)
        .min(machine)
        .min(limit.unwrap_or(u64::MAX));
    let held = |bytes: u64| bytes.min(most);
    let count = |said: u64, before: u64| said.min(MAX_COUNT).max(before);
    let nanos = |said: u64, before: u64| said.min(MAX_NANOS).max(before);
    let usage = held(said.memory_usage_bytes);
    let disk_bytes = host.scratch.map_or(MAX_COUNT, |disk| disk.size);
    ContainerStats {
        id: said.id.clone(),
        cpu_usage_nanos: nanos(said.cpu_usage_nanos, before.cpu_usage_nanos),
        memory_usage_bytes: usage,
        memory_working_set_bytes: said.memory_working_set_bytes.min(usage),
        memory_rss_bytes: held(said.memory_rss_bytes),
        memory_page_faults: count(said.memory_page_faults, before.memory_page_faults),
        memory_major_page_faults: count(
            said.memory_major_page_faults,
            before.memory_major_page_faults,
        ),
        memory_limit_bytes: limit.unwrap_or(0),
        pids: said.pids.min(MAX_TASKS),
        fs_used_bytes: said.fs_used_bytes.min(disk_bytes),
        fs_inodes_used: said.fs_inodes_used.min(disk_bytes / MIN_BLOCK),
        swap_usage_bytes: said.swap_usage_bytes.min(machine),
        cpu_user_nanos: nanos(said.cpu_user_nanos, before.cpu_user_nanos),
        cpu_system_nanos: nanos(said.cpu_system_nanos, before.cpu_system_nanos),
        cpu_periods: count(said.cpu_periods, before.cpu_periods),
        cpu_throttled_periods: count(said.cpu_throttled_periods, before.cpu_throttled_periods),
        cpu_throttled_nanos: nanos(said.cpu_throttled_nanos, before.cpu_throttled_nanos),
        cpu_pressure: pressure(said.cpu_pressure.as_ref(), before.cpu_pressure.as_ref()),
        memory_pressure: pressure(
            said.memory_pressure.as_ref(),
            before.memory_pressure.as_ref(),
        ),
        io_pressure: pressure(said.io_pressure.as_ref(), before.io_pressure.as_ref()),
        memory_file_bytes: held(said.memory_file_bytes),
        memory_mapped_file_bytes: held(said.memory_mapped_file_bytes),
        memory_kernel_bytes: held(said.memory_kernel_bytes),
        memory_peak_bytes: said.memory_peak_bytes.map(|peak| peak.min(machine)),
        memory_limit_hits: count(said.memory_limit_hits, before.memory_limit_hits),
        oom_kills: count(said.oom_kills, before.oom_kills),
        pids_limit: said.pids_limit.min(MAX_TASKS),
        processes: said.processes.min(MAX_TASKS),
        disks: disks(&said.disks, &before.disks),
    }
}

fn disks(said: &[DiskStats], before: &[DiskStats]) -> Vec<DiskStats> {
    let none = DiskStats::default();
    let of_one = |said: &DiskStats| {
        let name = plain_within(&said.name, MAX_NAME);
        let key = (said.major, said.minor);
        let same = |of: &&DiskStats| (of.major, of.minor) == key && of.name == name;
        let before = before.iter().find(same).unwrap_or(&none);
        let count = |said: u64, before: u64| said.min(MAX_COUNT).max(before);
        DiskStats {
            major: said.major,
            minor: said.minor,
            read_bytes: count(said.read_bytes, before.read_bytes),
            written_bytes: count(said.written_bytes, before.written_bytes),
            reads: count(said.reads, before.reads),
            writes: count(said.writes, before.writes),
            name,
        }
    };
    said.iter().take(MAX_DISKS).map(of_one).collect()
}

/// Shares of time are bounded where they are told: a hundred percent.
fn pressure(said: Option<&Pressure>, before: Option<&Pressure>) -> Option<Pressure> {
    let data = |said: &PressureData, before: Option<&PressureData>| PressureData {
        total_nanos: said
            .total_nanos
            .min(MAX_NANOS)
            .max(before.map_or(0, |before| before.total_nanos)),
        ..*said
    };
    said.map(|said| Pressure {
        some: said
            .some
            .as_ref()
            .map(|of| data(of, before.and_then(|b| b.some.as_ref()))),
        full: said
            .full
            .as_ref()
            .map(|of| data(of, before.and_then(|b| b.full.as_ref()))),
    })
}

fn guest_stats(said: &GuestStats, host: &Host, pod: &Facts) -> GuestStats {
    let held = |bytes: u64| bytes.min(pod.machine_bytes);
    let count = |count: u64| count.min(MAX_COUNT);
    let disk = said
        .scratch_bytes
        .min(host.scratch.map_or(MAX_COUNT, |disk| disk.size));
    let inodes = said.scratch_inodes.min(disk / MIN_BLOCK);
    let interface = |said: &InterfaceStats| InterfaceStats {
        name: plain_within(&said.name, MAX_NAME),
        rx_bytes: count(said.rx_bytes),
        rx_errors: count(said.rx_errors),
        tx_bytes: count(said.tx_bytes),
        tx_errors: count(said.tx_errors),
        rx_packets: count(said.rx_packets),
        rx_dropped: count(said.rx_dropped),
        tx_packets: count(said.tx_packets),
        tx_dropped: count(said.tx_dropped),
    };
    GuestStats {
        cpu_usage_nanos: said.cpu_usage_nanos.min(MAX_NANOS),
        memory_total_bytes: held(said.memory_total_bytes),
        memory_available_bytes: held(said.memory_available_bytes),
        process_count: said.process_count.min(MAX_TASKS),
        interfaces: said
            .interfaces
            .iter()
            .take(MAX_INTERFACES)
            .map(interface)
            .collect(),
        agent_rss_bytes: held(said.agent_rss_bytes),
        cpu_pressure: pressure(said.cpu_pressure.as_ref(), None),
        memory_pressure: pressure(said.memory_pressure.as_ref(), None),
        io_pressure: pressure(said.io_pressure.as_ref(), None),
        scratch_bytes: disk,
        scratch_inodes: inodes,
        scratch_free_inodes: said.scratch_free_inodes.min(inodes),
    }
}

#[cfg(test)]
#[path = "bounds_tests.rs"]
mod tests;
