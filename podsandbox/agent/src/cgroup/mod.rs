//! A container's cgroup (v2): limits, numbers, killing.
//!
//! Every container has `/sys/fs/cgroup/pod/ID`; each exec runs in a child of
//! it, `exec-N`, so that it can be killed alone. The children enable no
//! controllers, so the container's processes may live beside them.

mod limits;
mod update;
mod usage;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use tokio::io::Interest;
use tokio::time::{Instant, timeout_at};

use crate::sys;
use limits::{Setting, ends_as_a_whole, settings};
pub use usage::{Pressures, Usage, pod_pressures};

pub const ROOT: &str = "/sys/fs/cgroup";
pub const POD: &str = "/sys/fs/cgroup/pod";

/// The kernel's list of a cgroup's files that may be another's.
const DELEGATE: &str = "/sys/kernel/cgroup/delegate";

/// Largest cgroup file read: memory.stat is 2 KiB.
const MAX_FILE: u64 = 64 * 1024;

/// A process in an uninterruptible wait dies when that ends; beyond this, the
/// guest has a fault that the caller should hear of.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot create the cgroup {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot set {file} to {value:?}")]
    Set {
        file: String,
        value: String,
        source: io::Error,
    },
    #[error("the guest's kernel has no {file}, so a limit of {value} cannot be kept")]
    Absent { file: String, value: String },
    #[error("{file:?} is no name of a cgroup file")]
    Name { file: String },
    #[error(
        "it uses {used} bytes of memory that cannot be dropped, more than a limit of {limit} allows: its processes would be killed"
    )]
    InUse { used: u64, limit: u64 },
    #[error("cannot set oom_score_adj of process {pid} to {score}")]
    OomScore {
        pid: i32,
        score: i32,
        source: io::Error,
    },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot kill the processes of {path}")]
    Kill { path: PathBuf, source: io::Error },
    #[error("processes of {path} are still alive {} s after they were killed", KILL_TIMEOUT.as_secs())]
    StillAlive { path: PathBuf },
    #[error("cannot give {path} to root of the container")]
    Own { path: PathBuf, source: io::Error },
    #[error("cannot remove the cgroup {path}")]
    Remove { path: PathBuf, source: io::Error },
}

impl CgroupError {
    /// Whether the file to write to does not exist.
    fn is_absence(&self) -> bool {
        matches!(self, Self::Set { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// A directory of the cgroup file system. Dropping it removes nothing.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
}

impl Cgroup {
    pub fn create(path: PathBuf) -> Result<Self, CgroupError> {
        let failed = |source| CgroupError::Create {
            path: path.clone(),
            source,
        };
        fs::create_dir(&path).map_err(failed)?;
        Self::open(path.clone()).inspect_err(|_| {
            // Nothing lives in it yet, and the first error is the cause.
            let _ = fs::remove_dir(&path);
        })
    }

    /// One that is there.
    pub fn open(path: PathBuf) -> Result<Self, CgroupError> {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(&path);
        match opened {
            Ok(dir) => Ok(Self {
                path,
                dir: dir.into(),
            }),
            Err(source) => Err(CgroupError::Read { path, source }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    /// A child for one exec.
    pub fn child(&self, name: &str) -> Result<Self, CgroupError> {
        Self::create(self.path.join(name))
    }

    fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        OpenOptions::new()
            .write(true)
            .open(self.path.join(file))
            .and_then(|mut handle| handle.write_all(value.as_bytes()))
            .map_err(|source| CgroupError::Set {
                file: file.to_owned(),
                value: value.to_owned(),
                source,
            })
    }

    /// Writes a limit whose controller the guest's kernel may lack.
    fn write_if_there(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        match self.write(file, value) {
            Err(error) if error.is_absence() => Ok(()),
            result => result,
        }
    }

    fn read(&self, file: &str) -> Result<String, CgroupError> {
        read_file(&self.path.join(file))
    }

    /// What a new container's cgroup gets: what holds unless `resources` say
    /// otherwise, then their limits.
    pub fn prepare(&self, resources: Option<&LinuxResources>) -> Result<(), CgroupError> {
        if ends_as_a_whole(resources) {
            self.write_if_there("memory.oom.group", "1")?;
        }
        resources.map_or(Ok(()), |resources| self.apply(resources))
    }

    /// Lets user and group `owner` make cgroups below and move processes into
    /// them, within the limits that stay the agent's (cgroup-v2.rst,
    /// "Delegation").
    pub fn delegate(&self, owner: u32) -> Result<(), CgroupError> {
        let files = read_file(Path::new(DELEGATE))?;
        for file in files.lines().chain([""]) {
            let path = self.path.join(file);
            match std::os::unix::fs::chown(&path, Some(owner), Some(owner)) {
                // The kernel's list has files of controllers as well.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(CgroupError::Own { path, source }),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Sets what `resources` names and leaves the rest.
    pub fn apply(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        settings(resources)?
            .iter()
            .try_for_each(|setting| self.set(setting))
    }

    fn set(&self, setting: &Setting) -> Result<(), CgroupError> {
        match self.write(&setting.file, &setting.value) {
            Err(error) if error.is_absence() && setting.optional => Ok(()),
            Err(error) if error.is_absence() => Err(CgroupError::Absent {
                file: setting.file.clone(),
                value: setting.value.clone(),
            }),
            result => result,
        }
    }

    /// Times that the kernel's OOM killer ended a process in here.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        Ok(field(&self.read("memory.events")?, "oom_kill"))
    }

    /// Kills every process in here and below, and waits for their end.
    pub async fn kill(&self) -> Result<(), CgroupError> {
        let failed = |source| CgroupError::Kill {
            path: self.path.clone(),
            source,
        };
        let events = File::open(self.path.join("cgroup.events")).map_err(failed)?;
        if !populated(&events).map_err(failed)? {
            return Ok(());
        }
        self.send_kill()?;
        // The kernel signals a change of the file with POLLPRI.
        let events = sys::async_fd(events.into(), Interest::PRIORITY).map_err(failed)?;
        let deadline = Instant::now() + KILL_TIMEOUT;
        while populated(events.get_ref()).map_err(failed)? {
            match timeout_at(deadline, events.ready(Interest::PRIORITY)).await {
                Ok(Ok(mut ready)) => ready.clear_ready(),
                Ok(Err(error)) => return Err(failed(error)),
                Err(_) => {
                    return Err(CgroupError::StillAlive {
                        path: self.path.clone(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Kills without waiting.
    pub fn send_kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1").map_err(|error| match error {
            CgroupError::Set { source, .. } => CgroupError::Kill {
                path: self.path.clone(),
                source,
            },
            other => other,
        })
    }

    /// Removes the directory and those of ended execs; fails while anything
    /// lives in it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        remove_tree(&self.path).map_err(|source| CgroupError::Remove {
            path: self.path.clone(),
            source,
        })
    }

    /// Signals every process in here and below it. Best effort for processes
    /// that fork meanwhile.
    pub fn signal_all(&self, signal: i32) -> Result<(), CgroupError> {
        for pid in self.processes()? {
            // SAFETY: takes integers only, and no pid is 0, which would mean
            // the agent's own group.
            if unsafe { libc::kill(pid, signal) } != 0 {
                let source = io::Error::last_os_error();
                if source.raw_os_error() != Some(libc::ESRCH) {
                    let path = self.path.clone();
                    return Err(CgroupError::Kill { path, source });
                }
            }
        }
        Ok(())
    }

    /// The processes in here and below it, as they are now. None that the
    /// agent's PID namespace does not have.
    fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut found = Vec::new();
        let mut dirs = vec![self.path.clone()];
        while let Some(dir) = dirs.pop() {
            let pids = read_file(&dir.join("cgroup.procs"))?;
            let pids = pids.lines().filter_map(|line| line.parse::<i32>().ok());
            found.extend(pids.filter(|&pid| pid > 0));
            let failed = |source| CgroupError::Read {
                path: dir.clone(),
                source,
            };
            for entry in fs::read_dir(&dir).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                if entry.file_type().map_err(failed)?.is_dir() {
                    dirs.push(entry.path());
                }
            }
        }
        Ok(found)
    }
}

fn populated(events: impl AsFd) -> io::Result<bool> {
    let mut buffer = [0; 128];
    let length = nix::sys::uio::pread(events, &mut buffer, 0)?;
    let text = String::from_utf8_lossy(&buffer[..length]);
    Ok(field(&text, "populated") != 0)
}

/// Depth is bounded by what a container with a writable cgroup made of it.
fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(_) => {}
    }
    let mut dirs = vec![path.to_owned()];
    let mut index = 0;
    while let Some(dir) = dirs.get(index).cloned() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            }
        }
        index += 1;
    }
    dirs.iter().rev().try_for_each(fs::remove_dir)
}

fn read_file(path: &Path) -> Result<String, CgroupError> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text))
        .map_err(|source| CgroupError::Read {
            path: path.to_owned(),
            source,
        })?;
    Ok(text)
}

/// The number of `name` in a flat keyed file; zero when it is not there.
pub fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(' ')?
                .trim()
                .parse()
                .ok()
        })
        .unwrap_or(0)
}

/// Microseconds of CPU of the whole guest, as nanoseconds.
pub fn guest_cpu_nanos() -> Result<u64, CgroupError> {
    let text = read_file(&Path::new(ROOT).join("cpu.stat"))?;
    Ok(field(&text, "usage_usec").saturating_mul(1000))
}

/// Tasks in the pod's containers.
pub fn pod_tasks() -> Result<u64, CgroupError> {
    Ok(read_file(&Path::new(POD).join("pids.current"))?
        .trim()
        .parse()
        .unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_no_huge_pages_needs_no_kernel_that_has_them() {
        let resources: LinuxResources = serde_json::from_str(
            r#"{"hugepageLimits":[{"pageSize":"2MB","limit":0},{"pageSize":"1GB","limit":7}]}"#,
        )
        .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::create(dir.path().join("c")).unwrap();
        let error = cgroup.apply(&resources).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the guest's kernel has no hugetlb.1GB.max, so a limit of 7 cannot be kept"
        );
        let file = |size| cgroup.path().join(format!("hugetlb.{size}.max"));
        for size in ["2MB", "1GB"] {
            fs::write(file(size), "").unwrap();
        }
        cgroup.apply(&resources).unwrap();
        assert_eq!(fs::read_to_string(file("2MB")).unwrap(), "0");
        assert_eq!(fs::read_to_string(file("1GB")).unwrap(), "7");
    }

    #[test]
    fn keyed_files_are_read_by_whole_names() {
        let text = "oom 1\noom_kill 3\noom_group_kill 2\n";
        assert_eq!(field(text, "oom_kill"), 3);
        assert_eq!(field(text, "oom"), 1);
        assert_eq!(field(text, "none"), 0);
    }
}
