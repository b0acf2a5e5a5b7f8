//! Names and labels of all metrics, which never change while the daemon runs.

use cri_api::v1::MetricType;
use cri_api::v1::MetricType::{Counter, Gauge};

/// What every metric is labelled with, in this order; its own labels follow.
pub const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

pub struct Described {
    pub name: &'static str,
    pub help: &'static str,
    pub kind: MetricType,
    pub labels: &'static [&'static str],
}

const fn described(
    kind: MetricType,
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Described {
    Described {
        name,
        help,
        kind,
        labels,
    }
}

pub const METRICS: &[Described] = &[
    described(
        Counter,
        "container_cpu_usage_seconds_total",
        &["cpu"],
        "CPU time used, in seconds.",
    ),
    described(
        Counter,
        "container_cpu_user_seconds_total",
        &[],
        "CPU time used outside of the kernel, in seconds.",
    ),
    described(
        Counter,
        "container_cpu_system_seconds_total",
        &[],
        "CPU time used inside the kernel, in seconds.",
    ),
    described(
        Counter,
        "container_cpu_cfs_periods_total",
        &[],
        "Periods of its CPU limit in which it ran.",
    ),
    described(
        Counter,
        "container_cpu_cfs_throttled_periods_total",
        &[],
        "Periods in which it reached its CPU limit.",
    ),
    described(
        Counter,
        "container_cpu_cfs_throttled_seconds_total",
        &[],
        "Time that it was held back by its CPU limit, in seconds.",
    ),
    described(
        Gauge,
        "container_memory_cache",
        &[],
        "Memory that holds files, in bytes.",
    ),
    described(
        Gauge,
        "container_memory_rss",
        &[],
        "Memory that holds no files, in bytes.",
    ),
    described(
        Gauge,
        "container_memory_kernel_usage",
        &[],
        "Memory that the kernel uses for it, in bytes.",
    ),
    described(
        Gauge,
        "container_memory_mapped_file",
        &[],
        "Memory that holds files which are mapped, in bytes.",
    ),
    described(Gauge, "container_memory_swap", &[], "Swap used, in bytes."),
    described(
        Counter,
        "container_memory_failcnt",
        &[],
        "Times that its memory reached the limit.",
    ),
    described(
        Gauge,
        "container_memory_usage_bytes",
        &[],
        "Memory used, in bytes, whenever it was last accessed.",
    ),
    described(
        Gauge,
        "container_memory_max_usage_bytes",
        &[],
        "The most memory that it has used, in bytes.",
    ),
    described(
        Gauge,
        "container_memory_working_set_bytes",
        &[],
        "Memory used that cannot be taken back easily, in bytes.",
    ),
    described(
        Counter,
        "container_memory_failures_total",
        &["failure_type", "scope"],
        "Page faults.",
    ),
    described(
        Gauge,
        "container_fs_usage_bytes",
        &["device"],
        "What it has written to its file system, in bytes.",
    ),
    described(
        Gauge,
        "container_fs_limit_bytes",
        &["device"],
        "Size of the file system, in bytes.",
    ),
    described(
        Gauge,
        "container_fs_inodes_total",
        &["device"],
        "Inodes of the file system.",
    ),
    described(
        Gauge,
        "container_fs_inodes_free",
        &["device"],
        "Free inodes of the file system.",
    ),
    described(
        Counter,
        "container_fs_reads_bytes_total",
        &["device"],
        "Bytes read from a disk.",
    ),
    described(
        Counter,
        "container_fs_reads_total",
        &["device"],
        "Reads from a disk.",
    ),
    described(
        Counter,
        "container_fs_writes_bytes_total",
        &["device"],
        "Bytes written to a disk.",
    ),
    described(
        Counter,
        "container_fs_writes_total",
        &["device"],
        "Writes to a disk.",
    ),
    described(
        Counter,
        "container_blkio_device_usage_total",
        &["device", "major", "minor", "operation"],
        "Bytes moved from or to a disk.",
    ),
    described(
        Counter,
        "container_network_receive_bytes_total",
        &["interface"],
        "Bytes received.",
    ),
    described(
        Counter,
        "container_network_receive_packets_total",
        &["interface"],
        "Packets received.",
    ),
    described(
        Counter,
        "container_network_receive_packets_dropped_total",
        &["interface"],
        "Packets dropped instead of being received.",
    ),
    described(
        Counter,
        "container_network_receive_errors_total",
        &["interface"],
        "Errors of packets to be received.",
    ),
    described(
        Counter,
        "container_network_transmit_bytes_total",
        &["interface"],
        "Bytes sent.",
    ),
    described(
        Counter,
        "container_network_transmit_packets_total",
        &["interface"],
        "Packets sent.",
    ),
    described(
        Counter,
        "container_network_transmit_packets_dropped_total",
        &["interface"],
        "Packets dropped instead of being sent.",
    ),
    described(
        Counter,
        "container_network_transmit_errors_total",
        &["interface"],
        "Errors of packets to be sent.",
    ),
    described(
        Counter,
        "container_pressure_cpu_waiting_seconds_total",
        &[],
        "Time in which some task waited for CPU time, in seconds.",
    ),
    described(
        Counter,
        "container_pressure_cpu_stalled_seconds_total",
        &[],
        "Time in which all tasks waited for CPU time, in seconds.",
    ),
    described(
        Counter,
        "container_pressure_memory_waiting_seconds_total",
        &[],
        "Time in which some task waited for memory, in seconds.",
    ),
    described(
        Counter,
        "container_pressure_memory_stalled_seconds_total",
        &[],
        "Time in which all tasks waited for memory, in seconds.",
    ),
    described(
        Counter,
        "container_pressure_io_waiting_seconds_total",
        &[],
        "Time in which some task waited for disks, in seconds.",
    ),
    described(
        Counter,
        "container_pressure_io_stalled_seconds_total",
        &[],
        "Time in which all tasks waited for disks, in seconds.",
    ),
    described(
        Counter,
        "container_oom_events_total",
        &[],
        "Processes that the kernel ended for want of memory.",
    ),
    described(Gauge, "container_processes", &[], "Processes."),
    described(Gauge, "container_threads", &[], "Threads."),
    described(
        Gauge,
        "container_threads_max",
        &[],
        "Threads that it may have; 0 is no limit.",
    ),
    described(
        Gauge,
        "container_spec_cpu_period",
        &[],
        "Period of its CPU limit, in microseconds.",
    ),
    described(
        Gauge,
        "container_spec_cpu_quota",
        &[],
        "CPU time that it may use in a period, in microseconds.",
    ),
    described(
        Gauge,
        "container_spec_cpu_shares",
        &[],
        "Its share of CPU time beside others.",
    ),
    described(
        Gauge,
        "container_spec_memory_limit_bytes",
        &[],
        "Memory that it may use, in bytes; 0 is no limit.",
    ),
    described(
        Gauge,
        "container_spec_memory_swap_limit_bytes",
        &[],
        "Memory and swap that it may use, in bytes.",
    ),
    described(
        Gauge,
        "container_start_time_seconds",
        &[],
        "When it started, in seconds since the epoch.",
    ),
    described(
        Gauge,
        "container_last_seen",
        &[],
        "When it was last looked at, in seconds since the epoch.",
    ),
    described(
        Gauge,
        "drupe_pod_overhead_memory_bytes",
        &[],
        "Memory that the pod takes on its node beyond what its containers use, in bytes.",
    ),
    described(
        Gauge,
        "drupe_pod_overhead_declared_memory_bytes",
        &[],
        "Memory that the pod's RuntimeClass declares as its overhead, in bytes.",
    ),
    described(
        Counter,
        "drupe_pod_overhead_cpu_seconds_total",
        &[],
        "CPU time of the node beyond that of the pod's containers, in seconds.",
    ),
];
