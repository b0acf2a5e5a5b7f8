//! Control groups of the pod and its containers, which the OCI runtime makes:
//! killing, numbers, and the groups of execs. Both hierarchies are served: v2
//! as the agent does it, and v1 with one mount a controller.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use drupe_agent::cgroup::{self as unified, Pressures, Usage, field};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::sleep;

const ROOT: &str = unified::ROOT;
/// v1: the first of these that is mounted tells which processes are in a group.
const TRACERS: [&str; 4] = ["pids", "memory", "freezer", "cpu"];
/// A process in an uninterruptible wait dies when that ends.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// v1 has no event for a group that became empty.
const EMPTY_POLL: Duration = Duration::from_millis(5);
/// Beyond any memory: what v1 says where there is no limit.
const NO_LIMIT: u64 = 1 << 60;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("no control group hierarchy is mounted below {ROOT}")]
    NoHierarchy,
    #[error("cannot {action} {path:?}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("processes of {path:?} are still alive {} s after they were killed", KILL_TIMEOUT.as_secs())]
    StillAlive { path: PathBuf },
    #[error(transparent)]
    Unified(#[from] unified::CgroupError),
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::File {
        action,
        path,
        source,
    }
}

/// Which hierarchies this host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Unified,
    /// v1, with the hierarchy that processes are looked for in.
    Split(&'static str),
}

impl Layout {
    pub fn of_this_host() -> Result<Self, CgroupError> {
        let root = Path::new(ROOT);
        if root.join("cgroup.controllers").exists() {
            return Ok(Self::Unified);
        }
        let mounted = |name: &&str| root.join(name).join("cgroup.procs").exists();
        let tracer = TRACERS.into_iter().find(mounted);
        tracer.map(Self::Split).ok_or(CgroupError::NoHierarchy)
    }
}

/// A group in all hierarchies. The value is its name: dropping it removes
/// nothing.
#[derive(Clone, Debug)]
pub struct Group {
    layout: Layout,
    /// From the hierarchy's root.
    path: PathBuf,
}

impl Group {
    pub fn new(layout: Layout, path: &Path) -> Self {
        let path = path.strip_prefix("/").unwrap_or(path).to_owned();
        Self { layout, path }
    }

    pub fn below(&self, name: &str) -> Self {
        Self {
            layout: self.layout,
            path: self.path.join(name),
        }
    }

    /// Where its processes are listed.
    fn traced(&self) -> PathBuf {
        match self.layout {
            Layout::Unified => Path::new(ROOT).join(&self.path),
            Layout::Split(tracer) => self.of(tracer),
        }
    }

    fn of(&self, controller: &str) -> PathBuf {
        Path::new(ROOT).join(controller).join(&self.path)
    }

    /// Makes the group of an exec below this one, which the runtime has made.
    /// Returns it as the runtime's command line names it.
    pub fn make_below(&self, name: &str) -> Result<(Self, String), CgroupError> {
        let group = self.below(name);
        let dir = group.traced();
        fs::create_dir(&dir).map_err(failed("make the control group", &dir))?;
        let word = match self.layout {
            Layout::Unified => name.to_owned(),
            Layout::Split(tracer) => format!("{tracer}:{name}"),
        };
        Ok((group, word))
    }

    /// Removes what [`Group::make_below`] made. False while something lives in
    /// it.
    pub fn remove(&self) -> Result<bool, CgroupError> {
        let dir = self.traced();
        match fs::remove_dir(&dir) {
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => Ok(false),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove the control group", &dir)(error))
            }
            _ => Ok(true),
        }
    }

    /// Kills every process in here and below, and waits for their end. A group
    /// that is not there has none.
    pub async fn kill(&self) -> Result<(), CgroupError> {
        let dir = self.traced();
        if !dir.exists() {
            return Ok(());
        }
        match self.layout {
            Layout::Unified => Ok(unified::Cgroup::open(dir)?.kill().await?),
            Layout::Split(_) => {
                let deadline = Instant::now() + KILL_TIMEOUT;
                // One that forks meanwhile is found the next time.
                while signal_all(&dir, Some(Signal::SIGKILL))? > 0 {
                    if Instant::now() > deadline {
                        return Err(CgroupError::StillAlive { path: dir });
                    }
                    sleep(EMPTY_POLL).await;
                }
                Ok(())
            }
        }
    }

    /// Signals every process in here and below it. Best effort for processes
    /// that fork meanwhile.
    pub fn signal_all(&self, signal: Signal) -> Result<(), CgroupError> {
        signal_all(&self.traced(), Some(signal)).map(drop)
    }

    /// The OOM killer's preference for every process in here. One that has
    /// just ended needs none.
    pub fn set_oom_score(&self, score: i32) -> Result<(), CgroupError> {
        let dir = self.traced();
        let set =
            |pid: Pid| match fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
                Err(error)
                    if error.kind() != io::ErrorKind::NotFound
                        && error.raw_os_error() != Some(Errno::ESRCH as i32) =>
                {
                    Err(failed("set the OOM score of the processes of", &dir)(error))
                }
                _ => Ok(()),
            };
        for_all(&dir, set).map(drop)
    }

    /// Times that the kernel's OOM killer ended a process in here.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        match self.layout {
            Layout::Unified => Ok(unified::Cgroup::open(self.traced())?.oom_kills()?),
            Layout::Split(_) => {
                let text = read(&self.of("memory").join("memory.oom_control"))?;
                Ok(field(&text, "oom_kill"))
            }
        }
    }

    /// All zero for one that is not there.
    pub fn usage(&self) -> Result<Usage, CgroupError> {
        if !self.traced().exists() {
            return Ok(Usage::default());
        }
        match self.layout {
            Layout::Unified => Ok(unified::Cgroup::open(self.traced())?.usage()?),
            Layout::Split(_) => self.split_usage(),
        }
    }

    fn split_usage(&self) -> Result<Usage, CgroupError> {
        let number = |controller: &str, file: &str| -> Result<u64, CgroupError> {
            let text = read(&self.of(controller).join(file))?;
            Ok(text.trim().parse().unwrap_or(0))
        };
        let memory = number("memory", "memory.usage_in_bytes")?;
        let stat = read(&self.of("memory").join("memory.stat"))?;
        let limit = number("memory", "memory.limit_in_bytes")?;
        let cpu = read(&self.of("cpu").join("cpu.stat"))?;
        let with_swap = number("memory", "memory.memsw.usage_in_bytes")?;
        Ok(Usage {
            cpu_nanos: number("cpuacct", "cpuacct.usage")?,
            memory,
            // What the kubelet and cAdvisor call the working set.
            working_set: memory.saturating_sub(field(&stat, "total_inactive_file")),
            rss: field(&stat, "total_rss"),
            page_faults: field(&stat, "total_pgfault"),
            major_page_faults: field(&stat, "total_pgmajfault"),
            memory_limit: if limit < NO_LIMIT { limit } else { 0 },
            swap: with_swap.saturating_sub(memory),
            pids: number("pids", "pids.current")?,
            cpu_user_nanos: number("cpuacct", "cpuacct.usage_user")?,
            cpu_system_nanos: number("cpuacct", "cpuacct.usage_sys")?,
            cpu_periods: field(&cpu, "nr_periods"),
            cpu_throttled_periods: field(&cpu, "nr_throttled"),
            cpu_throttled_nanos: field(&cpu, "throttled_time"),
            file: field(&stat, "total_cache"),
            mapped_file: field(&stat, "total_mapped_file"),
            kernel: number("memory", "memory.kmem.usage_in_bytes")?,
            memory_peak: Some(number("memory", "memory.max_usage_in_bytes")?),
            limit_hits: number("memory", "memory.failcnt")?,
            oom_kills: self.oom_kills()?,
            pids_limit: number("pids", "pids.max")?,
            processes: for_all(&self.traced(), |_| Ok(()))? as u64,
            // v1 counts neither as v2 does.
            disks: Vec::new(),
            pressures: Pressures::default(),
        })
    }
}

/// Signals the processes in `dir` and below; returns how many there were.
fn signal_all(dir: &Path, signal: Option<Signal>) -> Result<usize, CgroupError> {
    for_all(dir, |pid| match kill(pid, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(failed("kill the processes of", dir)(errno.into())),
    })
}

/// Does it for each process in `dir` and below; returns how many there were.
fn for_all(
    dir: &Path,
    mut work: impl FnMut(Pid) -> Result<(), CgroupError>,
) -> Result<usize, CgroupError> {
    let mut count = 0;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for line in read(&dir.join("cgroup.procs"))?.lines() {
            // 0 is a process of another PID namespace.
            let Some(pid) = line.parse::<i32>().ok().filter(|pid| *pid > 1) else {
                continue;
            };
            count += 1;
            work(Pid::from_raw(pid))?;
        }
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.map_err(failed("read", &dir))?,
        };
        for entry in entries {
            let entry = entry.map_err(failed("read", &dir))?;
            if entry.file_type().map_err(failed("read", &dir))?.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    Ok(count)
}

/// Empty for a file of a group that has gone, or of a controller that the host
/// lacks.
fn read(path: &Path) -> Result<String, CgroupError> {
    match fs::read_to_string(path) {
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(Errno::ENODEV as i32) =>
        {
            Ok(String::new())
        }
        text => text.map_err(failed("read", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_group_is_killed_with_what_is_below_it() {
        let _alone = crate::ALONE.lock().await;
        let layout = Layout::of_this_host().unwrap();
        let group = Group::new(layout, Path::new("/drupe-shim-unit-test"));
        group.kill().await.unwrap();
        assert_eq!(group.usage().unwrap(), Usage::default());
        fs::create_dir(group.traced()).unwrap();
        let (exec, word) = group.make_below("exec-1").unwrap();
        assert!(word.ends_with("exec-1"), "{word}");
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        fs::write(exec.traced().join("cgroup.procs"), child.id().to_string()).unwrap();
        assert!(!exec.remove().unwrap(), "something lives in it");
        // The kernel keeps it in its group until it is reaped.
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        group.kill().await.unwrap();
        assert!(!reaper.join().unwrap().success());
        assert!(exec.remove().unwrap() && exec.remove().unwrap());
        assert!(group.remove().unwrap());
    }
}
