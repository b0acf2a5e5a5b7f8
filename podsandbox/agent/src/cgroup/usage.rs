//! What a cgroup's tasks use, as the kernel counts it.

use std::path::Path;

use agent_api::{DiskStats, Pressure, PressureData};

use super::{Cgroup, CgroupError, POD, field, read_file};

/// A guest has some thirty disks at most.
const MAX_DISKS: usize = 64;

/// Nanoseconds and bytes. What the kernel lacks reads as zero, or as absent
/// where zero would say something.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    pub cpu_nanos: u64,
    pub cpu_user_nanos: u64,
    pub cpu_system_nanos: u64,
    pub cpu_periods: u64,
    pub cpu_throttled_periods: u64,
    pub cpu_throttled_nanos: u64,
    pub memory: u64,
    pub working_set: u64,
    pub rss: u64,
    pub file: u64,
    pub mapped_file: u64,
    pub kernel: u64,
    pub memory_peak: Option<u64>,
    pub page_faults: u64,
    pub major_page_faults: u64,
    /// 0: none.
    pub memory_limit: u64,
    pub limit_hits: u64,
    pub oom_kills: u64,
    pub swap: u64,
    pub pids: u64,
    /// 0: none.
    pub pids_limit: u64,
    pub processes: u64,
    pub disks: Vec<DiskStats>,
    pub pressures: Pressures,
}

/// Of CPU, memory and disks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pressures {
    pub cpu: Option<Pressure>,
    pub memory: Option<Pressure>,
    pub io: Option<Pressure>,
}

impl Cgroup {
    pub fn usage(&self) -> Result<Usage, CgroupError> {
        let read = |file| Ok::<_, CgroupError>(self.read_if_there(file)?.unwrap_or_default());
        let (cpu, memory) = (read("cpu.stat")?, read("memory.stat")?);
        let events = read("memory.events")?;
        let nanos = |name| field(&cpu, name).saturating_mul(1000);
        let current = number(&read("memory.current")?);
        Ok(Usage {
            cpu_nanos: nanos("usage_usec"),
            cpu_user_nanos: nanos("user_usec"),
            cpu_system_nanos: nanos("system_usec"),
            cpu_periods: field(&cpu, "nr_periods"),
            cpu_throttled_periods: field(&cpu, "nr_throttled"),
            cpu_throttled_nanos: nanos("throttled_usec"),
            memory: current,
            // What the kubelet and cAdvisor call the working set.
            working_set: current.saturating_sub(field(&memory, "inactive_file")),
            rss: field(&memory, "anon"),
            file: field(&memory, "file"),
            mapped_file: field(&memory, "file_mapped"),
            kernel: field(&memory, "kernel"),
            memory_peak: self
                .read_if_there("memory.peak")?
                .and_then(|text| text.trim().parse().ok()),
            page_faults: field(&memory, "pgfault"),
            major_page_faults: field(&memory, "pgmajfault"),
            memory_limit: number(&read("memory.max")?),
            limit_hits: field(&events, "max"),
            oom_kills: field(&events, "oom_kill"),
            swap: number(&read("memory.swap.current")?),
            pids: number(&read("pids.current")?),
            pids_limit: number(&read("pids.max")?),
            processes: self.process_count()?,
            disks: disks(&read("io.stat")?),
            pressures: pressures(|file| self.read_if_there(file))?,
        })
    }

    /// The agent's cgroup of the container that it reads about may go at any
    /// time.
    fn process_count(&self) -> Result<u64, CgroupError> {
        match self.processes() {
            Err(CgroupError::Read { source, .. }) if is_gone(&source) => Ok(0),
            result => Ok(result?.len() as u64),
        }
    }

    /// None for a file of a controller that the kernel lacks, and for a
    /// container that has just gone.
    pub(super) fn read_if_there(&self, file: &str) -> Result<Option<String>, CgroupError> {
        if_there(self.read(file))
    }
}

/// Of all containers together.
pub fn pod_pressures() -> Result<Pressures, CgroupError> {
    pressures(|file| if_there(read_file(&Path::new(POD).join(file))))
}

fn if_there(read: Result<String, CgroupError>) -> Result<Option<String>, CgroupError> {
    match read {
        Err(CgroupError::Read { source, .. }) if is_gone(&source) => Ok(None),
        result => result.map(Some),
    }
}

/// EOPNOTSUPP: pressure that was switched off.
fn is_gone(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)
    )
}

/// "max" is no number.
fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

fn pressures(
    read: impl Fn(&str) -> Result<Option<String>, CgroupError>,
) -> Result<Pressures, CgroupError> {
    let of = |file| Ok::<_, CgroupError>(read(file)?.as_deref().and_then(pressure));
    Ok(Pressures {
        cpu: of("cpu.pressure")?,
        memory: of("memory.pressure")?,
        io: of("io.pressure")?,
    })
}

/// `some avg10=0.00 avg60=0.12 avg300=0.00 total=1234` and the same for `full`.
fn pressure(text: &str) -> Option<Pressure> {
    let line = |kind: &str| {
        let mut lines = text.lines();
        let rest = lines.find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
        let value = |name: &str| {
            rest.split_whitespace()
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
        };
        Some(PressureData {
            total_nanos: value("total")?.parse::<u64>().ok()?.saturating_mul(1000),
            avg10: hundredths(value("avg10")?)?,
            avg60: hundredths(value("avg60")?)?,
            avg300: hundredths(value("avg300")?)?,
        })
    };
    Some(Pressure {
        some: Some(line("some")?),
        // Kernels before 5.13 have none for CPU.
        full: line("full"),
    })
}

/// The kernel writes two digits after the point.
fn hundredths(percent: &str) -> Option<u32> {
    let (whole, part) = percent.split_once('.')?;
    let (whole, part): (u32, u32) = (whole.parse().ok()?, part.parse().ok()?);
    whole.checked_mul(100)?.checked_add(part)
}

/// `254:16 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`
fn disks(text: &str) -> Vec<DiskStats> {
    let disk = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let value = |name: &str| {
            rest.split_whitespace()
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
                .unwrap_or(0)
        };
        Some(DiskStats {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            read_bytes: value("rbytes"),
            written_bytes: value("wbytes"),
            reads: value("rios"),
            writes: value("wios"),
            name: serial(device),
        })
    };
    text.lines().filter_map(disk).take(MAX_DISKS).collect()
}

/// Of a virtio disk; others have none.
fn serial(device: &str) -> String {
    let path = Path::new("/sys/dev/block").join(device).join("serial");
    let text = read_file(&path).unwrap_or_default();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_read_in_nanoseconds_and_hundredths_of_a_percent() {
        let text = "some avg10=12.05 avg60=0.00 avg300=100.00 total=1234\n\
                    full avg10=0.00 avg60=0.50 avg300=0.00 total=5\n";
        let read = pressure(text).unwrap();
        let some = read.some.unwrap();
        assert_eq!((some.total_nanos, some.avg10), (1_234_000, 1205));
        assert_eq!((some.avg60, some.avg300), (0, 10_000));
        let full = read.full.unwrap();
        assert_eq!((full.total_nanos, full.avg60), (5000, 50));
        let only = pressure(text.lines().next().unwrap()).unwrap();
        assert!(only.some.is_some() && only.full.is_none());
        for bad in ["", "some", "some avg10=x avg60=0.00 avg300=0.00 total=1"] {
            assert_eq!(pressure(bad), None, "{bad}");
        }
    }

    #[test]
    fn each_disk_is_counted_for_itself() {
        let text = "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n254:16 \n";
        let read = disks(text);
        assert_eq!(read.len(), 2);
        assert_eq!(
            (read[0].major, read[0].minor, read[0].read_bytes),
            (254, 0, 4096)
        );
        assert_eq!(
            (read[0].written_bytes, read[0].reads, read[0].writes),
            (8192, 1, 2)
        );
        assert_eq!((read[1].minor, read[1].reads), (16, 0));
    }

    #[test]
    fn a_kernel_without_pressure_has_none_and_no_container_has_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::create(dir.path().join("c")).unwrap();
        assert_eq!(cgroup.usage().unwrap(), Usage::default());
    }
}
