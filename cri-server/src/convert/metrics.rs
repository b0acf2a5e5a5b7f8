//! Metrics that the kubelet passes on to Prometheus: by the names, labels and
//! units of cAdvisor, which the field's dashboards ask for.
//!
//! CRI has whole numbers only, so seconds are whole. What drupe does not know
//! (open files and sockets, per-CPU times) is not there rather than zero.

mod table;

use cri_api::v1;
use podsandbox::record::ContainerRecord;
use podsandbox::{ContainerStats, Figures, Overhead, PodSnapshot, Pressure};

use self::table::{LABELS, METRICS};

const NANOS: u64 = 1_000_000_000;

pub fn descriptors() -> Vec<v1::MetricDescriptor> {
    let labels = |extra: &[&str]| {
        let all = LABELS.iter().chain(extra);
        all.map(|label| (*label).to_owned()).collect()
    };
    METRICS
        .iter()
        .map(|metric| v1::MetricDescriptor {
            name: metric.name.to_owned(),
            help: metric.help.to_owned(),
            label_keys: labels(metric.labels),
        })
        .collect()
}

/// Of a pod that used so much at `now`, in nanoseconds since the epoch.
pub fn pod(pod: &PodSnapshot, figures: &Figures, now: i64) -> v1::PodSandboxMetrics {
    let mut of_pod = Metrics::new(labels(pod, None));
    of_pod.of_pod(pod, figures, now);
    if let Some(overhead) = figures.overhead(&pod.pod) {
        of_pod.of_overhead(&overhead);
    }
    let container = |record: &ContainerRecord| {
        let of = figures.containers.get(&record.id)?;
        let mut metrics = Metrics::new(labels(pod, Some(record)));
        metrics.of_container(record, of, figures, now);
        Some(v1::ContainerMetrics {
            container_id: record.id.clone(),
            metrics: metrics.all,
        })
    };
    let containers = pod.containers.values();
    v1::PodSandboxMetrics {
        pod_sandbox_id: pod.pod.id.clone(),
        metrics: of_pod.all,
        container_metrics: containers.filter_map(|record| container(record)).collect(),
    }
}

/// Values of [`LABELS`]. The pod itself has neither container nor image.
fn labels(pod: &PodSnapshot, container: Option<&ContainerRecord>) -> Vec<String> {
    let id = container.map_or(&pod.pod.id, |record| &record.id);
    let name = &pod.pod.spec.name;
    vec![
        container.map_or(String::new(), |record| record.spec.name.name.clone()),
        id.clone(),
        container.map_or(String::new(), |record| record.image_name.clone()),
        id.clone(),
        name.namespace.clone(),
        name.name.clone(),
    ]
}

struct Metrics {
    labels: Vec<String>,
    all: Vec<v1::Metric>,
}

impl Metrics {
    fn new(labels: Vec<String>) -> Self {
        Self {
            labels,
            all: Vec::new(),
        }
    }

    fn add(&mut self, name: &str, value: u64) {
        self.add_with(name, &[], value);
    }

    /// What no descriptor has, the kubelet would drop: see the tests.
    fn add_with(&mut self, name: &str, labels: &[&str], value: u64) {
        let Some(metric) = METRICS.iter().find(|metric| metric.name == name) else {
            return;
        };
        let own = self.labels.iter().cloned();
        let extra = labels.iter().map(|label| (*label).to_owned());
        self.all.push(v1::Metric {
            name: name.to_owned(),
            // Gathered for this answer.
            timestamp: 0,
            metric_type: metric.kind.into(),
            label_values: own.chain(extra).collect(),
            value: Some(v1::UInt64Value { value }),
        });
    }

    fn of_pod(&mut self, pod: &PodSnapshot, figures: &Figures, now: i64) {
        let (of, guest) = (&figures.pod, &figures.guest);
        let total = ["total"];
        let cpu = of.cpu_nanos / NANOS;
        self.add_with("container_cpu_usage_seconds_total", &total, cpu);
        self.add("container_memory_usage_bytes", of.memory_usage_bytes);
        let working_set = of.memory_working_set_bytes;
        self.add("container_memory_working_set_bytes", working_set);
        self.pressure("cpu", guest.cpu_pressure.as_ref());
        self.pressure("memory", guest.memory_pressure.as_ref());
        self.pressure("io", guest.io_pressure.as_ref());
        self.times(pod.pod.created_at_nanos, now);
        for interface in &guest.interfaces {
            let name = interface.name.as_str();
            for (what, received, sent) in [
                ("bytes", interface.rx_bytes, interface.tx_bytes),
                ("packets", interface.rx_packets, interface.tx_packets),
                (
                    "packets_dropped",
                    interface.rx_dropped,
                    interface.tx_dropped,
                ),
                ("errors", interface.rx_errors, interface.tx_errors),
            ] {
                for (way, value) in [("receive", received), ("transmit", sent)] {
                    let metric = format!("container_network_{way}_{what}_total");
                    self.add_with(&metric, &[name], value);
                }
            }
        }
    }

    fn of_overhead(&mut self, overhead: &Overhead) {
        self.add("drupe_pod_overhead_memory_bytes", overhead.memory_bytes);
        let cpu = overhead.cpu_nanos / NANOS;
        self.add("drupe_pod_overhead_cpu_seconds_total", cpu);
        if let Some(declared) = overhead.declared_memory_bytes {
            self.add("drupe_pod_overhead_declared_memory_bytes", declared);
        }
    }

    fn of_container(
        &mut self,
        record: &ContainerRecord,
        of: &ContainerStats,
        figures: &Figures,
        now: i64,
    ) {
        self.cpu(record, of);
        self.memory(of);
        self.disks(of, figures);
        self.pressure("cpu", of.cpu_pressure.as_ref());
        self.pressure("memory", of.memory_pressure.as_ref());
        self.pressure("io", of.io_pressure.as_ref());
        self.add("container_oom_events_total", of.oom_kills);
        self.add("container_processes", of.processes);
        self.add("container_threads", of.pids);
        self.add("container_threads_max", of.pids_limit);
        self.spec(record);
        self.times(record.started_at_nanos, now);
    }

    fn cpu(&mut self, record: &ContainerRecord, of: &ContainerStats) {
        let usage = of.cpu_usage_nanos / NANOS;
        self.add_with("container_cpu_usage_seconds_total", &["total"], usage);
        let (user, system) = (of.cpu_user_nanos, of.cpu_system_nanos);
        self.add("container_cpu_user_seconds_total", user / NANOS);
        self.add("container_cpu_system_seconds_total", system / NANOS);
        // Without a limit there are no periods.
        if record.spec.resources.cpu_quota_us.is_some() {
            self.add("container_cpu_cfs_periods_total", of.cpu_periods);
            self.add(
                "container_cpu_cfs_throttled_periods_total",
                of.cpu_throttled_periods,
            );
            self.add(
                "container_cpu_cfs_throttled_seconds_total",
                of.cpu_throttled_nanos / NANOS,
            );
        }
    }

    fn memory(&mut self, of: &ContainerStats) {
        for (name, value) in [
            ("container_memory_cache", of.memory_file_bytes),
            ("container_memory_rss", of.memory_rss_bytes),
            ("container_memory_kernel_usage", of.memory_kernel_bytes),
            ("container_memory_mapped_file", of.memory_mapped_file_bytes),
            ("container_memory_swap", of.swap_usage_bytes),
            ("container_memory_failcnt", of.memory_limit_hits),
            ("container_memory_usage_bytes", of.memory_usage_bytes),
            (
                "container_memory_working_set_bytes",
                of.memory_working_set_bytes,
            ),
        ] {
            self.add(name, value);
        }
        if let Some(peak) = of.memory_peak_bytes {
            self.add("container_memory_max_usage_bytes", peak);
        }
        for (kind, count) in [
            ("pgfault", of.memory_page_faults),
            ("pgmajfault", of.memory_major_page_faults),
        ] {
            // The kernel counts a cgroup with those below it.
            for scope in ["container", "hierarchy"] {
                self.add_with("container_memory_failures_total", &[kind, scope], count);
            }
        }
    }

    fn disks(&mut self, of: &ContainerStats, figures: &Figures) {
        const SCRATCH: &str = "scratch";
        self.add_with("container_fs_usage_bytes", &[SCRATCH], of.fs_used_bytes);
        // A pod on the host's kernel has no disk of its own.
        let guest = &figures.guest;
        if guest.scratch_bytes > 0 {
            for (name, value) in [
                ("container_fs_limit_bytes", guest.scratch_bytes),
                ("container_fs_inodes_total", guest.scratch_inodes),
                ("container_fs_inodes_free", guest.scratch_free_inodes),
            ] {
                self.add_with(name, &[SCRATCH], value);
            }
        }
        for disk in &of.disks {
            let name = disk.name.as_str();
            for (metric, value) in [
                ("container_fs_reads_bytes_total", disk.read_bytes),
                ("container_fs_reads_total", disk.reads),
                ("container_fs_writes_bytes_total", disk.written_bytes),
                ("container_fs_writes_total", disk.writes),
            ] {
                self.add_with(metric, &[name], value);
            }
            let (major, minor) = (disk.major.to_string(), disk.minor.to_string());
            for (operation, value) in [("Read", disk.read_bytes), ("Write", disk.written_bytes)] {
                self.add_with(
                    "container_blkio_device_usage_total",
                    &[name, &major, &minor, operation],
                    value,
                );
            }
        }
    }

    fn pressure(&mut self, of: &str, pressure: Option<&Pressure>) {
        let Some(pressure) = pressure else { return };
        let kinds = [("waiting", &pressure.some), ("stalled", &pressure.full)];
        for (kind, data) in kinds {
            if let Some(data) = data {
                let name = format!("container_pressure_{of}_{kind}_seconds_total");
                self.add(&name, data.total_nanos / NANOS);
            }
        }
    }

    fn spec(&mut self, record: &ContainerRecord) {
        let resources = &record.spec.resources;
        let memory = resources.memory_limit_bytes.unwrap_or(0);
        self.add("container_spec_memory_limit_bytes", memory);
        for (name, value) in [
            ("container_spec_cpu_period", resources.cpu_period_us),
            ("container_spec_cpu_quota", resources.cpu_quota_us),
            ("container_spec_cpu_shares", resources.cpu_shares),
            (
                "container_spec_memory_swap_limit_bytes",
                resources.memory_swap_limit_bytes,
            ),
        ] {
            if let Some(value) = value {
                self.add(name, value);
            }
        }
    }

    fn times(&mut self, started: i64, now: i64) {
        let seconds = |nanos: i64| u64::try_from(nanos).unwrap_or(0) / NANOS;
        if started > 0 {
            self.add("container_start_time_seconds", seconds(started));
        }
        self.add("container_last_seen", seconds(now));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use podsandbox::PressureData;

    use super::*;

    #[test]
    fn every_metric_is_described_once_with_a_value_for_each_label() {
        let described: Vec<_> = descriptors();
        let names: BTreeSet<_> = described.iter().map(|d| d.name.as_str()).collect();
        assert_eq!(names.len(), described.len());

        let data = PressureData {
            total_nanos: 3 * NANOS,
            ..PressureData::default()
        };
        let pressure = Some(Pressure {
            some: Some(data),
            full: Some(data),
        });
        let mut metrics = Metrics::new(LABELS.map(str::to_owned).to_vec());
        metrics.pressure("cpu", pressure.as_ref());
        metrics.pressure("memory", pressure.as_ref());
        metrics.pressure("io", pressure.as_ref());
        metrics.memory(&ContainerStats {
            memory_peak_bytes: Some(1),
            ..ContainerStats::default()
        });
        const DISKS: usize = 9;
        let mut figures = Figures::default();
        figures.guest.scratch_bytes = 1;
        let disk = podsandbox::DiskStats::default();
        metrics.disks(
            &ContainerStats {
                disks: vec![disk; DISKS],
                ..ContainerStats::default()
            },
            &figures,
        );
        metrics.times(1, 2);
        // 6 of pressure, 13 of memory, 4 of the file system, 6 of a disk.
        assert_eq!(metrics.all.len(), 6 + 13 + 4 + 6 * DISKS + 2);
        for metric in &metrics.all {
            let of = described.iter().find(|d| d.name == metric.name).unwrap();
            assert_eq!(of.label_keys.len(), metric.label_values.len(), "{metric:?}");
        }
        assert_eq!(metrics.all[0].value, Some(v1::UInt64Value { value: 3 }));
    }
}
