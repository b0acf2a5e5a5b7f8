//! `drupe top`: what the pods that run use, looked at again and again.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use clap::ValueEnum;
use cri_api::v1::PodSandboxStats;
use tokio::time::MissedTickBehavior;

use super::pods::{brief, created, start_took};
use super::{CliError, Daemon, Pod, full_name, runtime, short};

/// Home, and everything below is cleared: what was there stays in the
/// terminal's history.
const CLEAR: &str = "\x1b[H\x1b[J";
const MIB: u64 = 1 << 20;
const HEAD: [&str; 8] = [
    "POD ID",
    "NAMESPACE/NAME",
    "HANDLER",
    "CPU",
    "MEMORY",
    "OVERHEAD",
    "START",
    "AGE",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    Cpu,
    Memory,
    Overhead,
    /// The newest first.
    Age,
}

#[derive(clap::Args)]
pub struct Options {
    /// How many tables to show; without it, until interrupted.
    #[arg(short = 'n', long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Seconds between two looks, over which CPU is measured.
    #[arg(short, long, value_name = "SECONDS", default_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    delay: u64,
    /// One table and no more.
    #[arg(long, conflicts_with = "count")]
    once: bool,
    #[arg(long, value_enum, default_value = "cpu")]
    sort: Sort,
}

impl Options {
    fn tables(&self) -> Option<u64> {
        if self.once { Some(1) } else { self.count }
    }
}

pub fn run(socket: &Path, options: &Options) -> Result<(), CliError> {
    runtime()?.block_on(watch(socket, options))
}

async fn watch(socket: &Path, options: &Options) -> Result<(), CliError> {
    let mut daemon = Daemon::connect(socket).await?;
    let mut rhythm = tokio::time::interval(Duration::from_secs(options.delay));
    rhythm.set_missed_tick_behavior(MissedTickBehavior::Delay);
    rhythm.tick().await;
    // A use of CPU lies between two looks.
    let mut before = usage(daemon.stats().await?);
    let mut left = options.tables();
    while left != Some(0) {
        rhythm.tick().await;
        let now = usage(daemon.stats().await?);
        let mut rows = Vec::new();
        for listed in daemon.list().await? {
            // One that vanishes meanwhile is on the next list no more.
            let Some(pod) = daemon.show(listed).await? else {
                continue;
            };
            if pod.is_ready() {
                let id = pod.listed.id.as_str();
                rows.push(Row::new(&pod, before.get(id), now.get(id)));
            }
        }
        sort(&mut rows, options.sort);
        show(&table(&rows, SystemTime::now())).map_err(CliError::Output)?;
        before = now;
        left = left.map(|left| left - 1);
    }
    Ok(())
}

/// Of one pod's containers, by their guest's word.
#[derive(Debug, Default, PartialEq, Eq)]
struct Usage {
    at_nanos: i64,
    memory_bytes: u64,
    /// CPU time by container: a sum would fall when one of them goes.
    cpu_nanos: HashMap<String, u64>,
}

/// By pod.
fn usage(stats: Vec<PodSandboxStats>) -> HashMap<String, Usage> {
    let of_pod = |stats: PodSandboxStats| {
        let linux = stats.linux?;
        let mut usage = Usage {
            at_nanos: linux.cpu.as_ref()?.timestamp,
            ..Usage::default()
        };
        for container in linux.containers {
            let memory = container.memory.and_then(|of| of.working_set_bytes);
            let memory = memory.map_or(0, |bytes| bytes.value);
            usage.memory_bytes = usage.memory_bytes.saturating_add(memory);
            let cpu = container.cpu.and_then(|of| of.usage_core_nano_seconds);
            if let (Some(of), Some(nanos)) = (container.attributes, cpu) {
                usage.cpu_nanos.insert(of.id, nanos.value);
            }
        }
        Some((stats.attributes?.id, usage))
    };
    stats.into_iter().filter_map(of_pod).collect()
}

impl Usage {
    /// In thousandths of one CPU since `before`; none: no time has passed.
    fn millicpu_since(&self, before: &Self) -> Option<u64> {
        let passed = u64::try_from(self.at_nanos.saturating_sub(before.at_nanos)).ok()?;
        let used = self.cpu_nanos.iter().fold(0u64, |sum, (id, nanos)| {
            // A container that was not there has begun since.
            let then = before.cpu_nanos.get(id).copied().unwrap_or(0);
            sum.saturating_add(nanos.saturating_sub(then))
        });
        let millis = u128::from(used) * 1000;
        let millicpu = millis.checked_div(u128::from(passed))?;
        u64::try_from(millicpu).ok()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    id: String,
    name: String,
    handler: String,
    /// None: not known yet, or the guest did not answer.
    millicpu: Option<u64>,
    memory_bytes: Option<u64>,
    /// None: on the node's kernel, or not told.
    overhead_bytes: Option<u64>,
    start: Option<Duration>,
    created: SystemTime,
}

impl Row {
    fn new(pod: &Pod, before: Option<&Usage>, now: Option<&Usage>) -> Self {
        let overhead = pod.details.overhead.as_ref();
        let known = before.zip(now);
        Self {
            id: short(&pod.listed.id).to_owned(),
            name: full_name(&pod.listed),
            handler: pod.details.handler.clone(),
            millicpu: known.and_then(|(before, now)| now.millicpu_since(before)),
            memory_bytes: now.map(|usage| usage.memory_bytes),
            overhead_bytes: overhead.map(|measured| measured.overhead.memory_bytes),
            start: start_took(pod),
            created: created(pod),
        }
    }
}

/// The largest first; of those that are alike, by name.
fn sort(rows: &mut [Row], by: Sort) {
    rows.sort_by(|a, b| {
        let order = match by {
            Sort::Cpu => b.millicpu.cmp(&a.millicpu),
            Sort::Memory => b.memory_bytes.cmp(&a.memory_bytes),
            Sort::Overhead => b.overhead_bytes.cmp(&a.overhead_bytes),
            Sort::Age => b.created.cmp(&a.created),
        };
        order.then_with(|| (&a.name, &a.id).cmp(&(&b.name, &b.id)))
    });
}

fn table(rows: &[Row], now: SystemTime) -> String {
    let sum = |of: fn(&Row) -> Option<u64>| {
        let known = rows.iter().filter_map(of);
        known.fold(0, u64::saturating_add)
    };
    let summary = format!(
        "pods {}, CPU {}, memory {}, overhead {}\n\n",
        rows.len(),
        percent(sum(|row| row.millicpu)),
        mebibytes(sum(|row| row.memory_bytes)),
        mebibytes(sum(|row| row.overhead_bytes)),
    );
    let unknown = || "-".to_owned();
    let mut cells = vec![HEAD.map(str::to_owned)];
    cells.extend(rows.iter().map(|row| {
        let age = now.duration_since(row.created).unwrap_or_default();
        [
            row.id.clone(),
            row.name.clone(),
            row.handler.clone(),
            row.millicpu.map_or_else(unknown, percent),
            row.memory_bytes.map_or_else(unknown, mebibytes),
            row.overhead_bytes.map_or_else(unknown, mebibytes),
            row.start
                .map_or_else(unknown, |took| format!("{}ms", took.as_millis())),
            brief(age),
        ]
    }));
    summary + &super::table::table(&cells)
}

/// Of one CPU.
fn percent(millicpu: u64) -> String {
    format!("{}.{}%", millicpu / 10, millicpu % 10)
}

fn mebibytes(bytes: u64) -> String {
    let tenths = u128::from(bytes) * 10 / u128::from(MIB);
    format!("{}.{}Mi", tenths / 10, tenths % 10)
}

/// On a terminal in place of what was shown before, as far as it fits.
fn show(table: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if out.is_terminal() {
        let size = rustix::termios::tcgetwinsize(&out)?;
        let fitting = fit(table, size.ws_row.into(), size.ws_col.into());
        out.write_all(CLEAR.as_bytes())?;
        out.write_all(fitting.as_bytes())?;
    } else {
        out.write_all(table.as_bytes())?;
    }
    out.flush()
}

/// A terminal that does not know its size takes all. The last line stays free:
/// the cursor ends there.
fn fit(table: &str, rows: usize, columns: usize) -> String {
    if rows == 0 || columns == 0 {
        return table.to_owned();
    }
    let lines = table.lines().take(rows - 1);
    lines
        .map(|line| line.chars().take(columns).chain(['\n']).collect::<String>())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use cri_api::v1;

    use super::*;

    fn row(name: &str, millicpu: Option<u64>, memory_mib: u64, overhead_mib: u64) -> Row {
        Row {
            id: "0123456789abc".to_owned(),
            name: format!("shop/{name}"),
            handler: "microvm".to_owned(),
            millicpu,
            memory_bytes: Some(memory_mib * MIB),
            overhead_bytes: (overhead_mib > 0).then_some(overhead_mib * MIB),
            start: Some(Duration::from_millis(140)),
            created: UNIX_EPOCH + Duration::from_secs(overhead_mib),
        }
    }

    #[test]
    fn the_table_has_a_sum_and_a_line_a_pod_and_no_orders_for_the_terminal() {
        let rows = [row("web", Some(1234), 12, 30), row("a\x1b[2J", None, 0, 0)];
        assert_eq!(
            table(&rows, UNIX_EPOCH + Duration::from_secs(90)),
            "pods 2, CPU 123.4%, memory 12.0Mi, overhead 30.0Mi\n\
             \n\
             POD ID         NAMESPACE/NAME  HANDLER  CPU     MEMORY  OVERHEAD  START  AGE\n\
             0123456789abc  shop/web        microvm  123.4%  12.0Mi  30.0Mi    140ms  60s\n\
             0123456789abc  shop/a?[2J      microvm  -       0.0Mi   -         140ms  90s\n"
        );
        assert_eq!(table(&[], UNIX_EPOCH).lines().count(), 3);
    }

    #[test]
    fn pods_are_sorted_by_what_is_asked() {
        let rows = [
            row("b", Some(5), 1, 40),
            row("a", Some(5), 3, 0),
            row("c", None, 2, 20),
        ];
        for (by, names) in [
            (Sort::Cpu, ["a", "b", "c"]),
            (Sort::Memory, ["a", "c", "b"]),
            (Sort::Overhead, ["b", "c", "a"]),
            (Sort::Age, ["b", "c", "a"]),
        ] {
            let mut sorted = rows.to_vec();
            sort(&mut sorted, by);
            let sorted: Vec<_> = sorted.iter().map(|row| row.name.clone()).collect();
            assert_eq!(sorted, names.map(|name| format!("shop/{name}")), "{by:?}");
        }
    }

    #[test]
    fn cpu_is_what_containers_used_between_two_looks() {
        let stats = |seconds: i64, containers: &[(&str, u64)]| {
            let containers = containers.iter().map(|&(id, nanos)| v1::ContainerStats {
                attributes: Some(v1::ContainerAttributes {
                    id: id.to_owned(),
                    ..Default::default()
                }),
                cpu: Some(v1::CpuUsage {
                    usage_core_nano_seconds: Some(v1::UInt64Value { value: nanos }),
                    ..Default::default()
                }),
                memory: Some(v1::MemoryUsage {
                    working_set_bytes: Some(v1::UInt64Value { value: 7 }),
                    ..Default::default()
                }),
                ..Default::default()
            });
            let mut all = usage(vec![PodSandboxStats {
                attributes: Some(v1::PodSandboxAttributes {
                    id: "p".to_owned(),
                    ..Default::default()
                }),
                linux: Some(v1::LinuxPodSandboxStats {
                    cpu: Some(v1::CpuUsage {
                        timestamp: seconds * 1_000_000_000,
                        ..Default::default()
                    }),
                    containers: containers.collect(),
                    ..Default::default()
                }),
                windows: None,
            }]);
            all.remove("p").unwrap()
        };
        let before = stats(10, &[("stays", 1_000_000_000), ("goes", 9_000_000_000)]);
        let now = stats(12, &[("stays", 2_000_000_000), ("comes", 500_000_000)]);
        assert_eq!(now.memory_bytes, 14);
        assert_eq!(now.millicpu_since(&before), Some(750));
        // A guest may say anything, and a clock may be set.
        assert_eq!(before.millicpu_since(&now), None);
        assert_eq!(now.millicpu_since(&now), None);
        let lies = stats(11, &[("stays", u64::MAX), ("goes", u64::MAX)]);
        assert!(lies.millicpu_since(&before).is_some());
    }

    #[test]
    fn a_terminal_gets_what_fits() {
        assert_eq!(fit("abc\nde\nf\n", 3, 2), "ab\nde\n");
        assert_eq!(fit("abc\n", 0, 0), "abc\n");
    }
}
