//! A cgroup that tells which processes a node has started, whoever their
//! parent has become, and ends them all. It sets no limit. Below it is the
//! cgroup that pods name as their parent, as the kubelet makes one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::eventually;

/// How long killed processes may take to be gone.
const KILL_WITHIN: Duration = Duration::from_secs(20);

/// The cgroup of pods, below a node's.
const PODS: &str = "pods";

/// Where drupe puts pods that name no parent.
pub const OF_DAEMON: &str = "drupe";

/// Held by whoever has pods in [`OF_DAEMON`], which all nodes of the machine
/// share, or looks what is left of it.
static DAEMONS_PARENT: Mutex<()> = Mutex::new(());

pub fn lock_parent_of_daemon() -> MutexGuard<'static, ()> {
    DAEMONS_PARENT
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// The group `name` in each hierarchy that has it.
pub fn groups(name: &str) -> Result<Vec<PathBuf>> {
    let (mounts, _) = hierarchies()?;
    let paths = mounts.iter().map(|mount| mount.join(name));
    Ok(paths.filter(|path| path.exists()).collect())
}

pub struct Cgroup {
    name: String,
    /// In the version 2 hierarchy, which every process is in.
    path: PathBuf,
    /// The same in each hierarchy, version 2 included.
    everywhere: Vec<PathBuf>,
}

impl Cgroup {
    pub fn create(name: &str) -> Result<Self> {
        let (mounts, unified) = hierarchies()?;
        let everywhere: Vec<_> = mounts.iter().map(|mount| mount.join(name)).collect();
        for path in &everywhere {
            let pods = path.join(PODS);
            fs::create_dir_all(&pods)
                .with_context(|| format!("create cgroup {}", pods.display()))?;
        }
        Ok(Self {
            name: name.to_owned(),
            path: unified.join(name),
            everywhere,
        })
    }

    /// `cgroup_parent` of the node's pods.
    #[must_use]
    pub fn pods_parent(&self) -> String {
        format!("/{}/{PODS}", self.name)
    }

    /// Cgroups below the pods' parent, and beside it, where machines boot.
    pub fn of_pods(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for path in &self.everywhere {
            let pods = path.join(PODS);
            let below = tree(path)?.into_iter().skip(1);
            found.extend(below.filter(|group| *group != pods));
        }
        Ok(found)
    }

    /// The daemon's own parent of pods' cgroups, which goes with the last pod.
    pub fn empty_parents_of_daemon() -> Result<Vec<PathBuf>> {
        let _no_test_uses_it = lock_parent_of_daemon();
        let mut empty = groups(OF_DAEMON)?;
        empty.retain(|path| tree(path).is_ok_and(|dirs| dirs.len() == 1));
        Ok(empty)
    }

    /// Its directory in each hierarchy, that of version 2 first.
    #[must_use]
    pub fn everywhere(&self) -> Vec<&Path> {
        let others = self.everywhere.iter().filter(|path| **path != self.path);
        std::iter::once(&self.path)
            .chain(others)
            .map(PathBuf::as_path)
            .collect()
    }

    /// What a process writes its id to in order to join.
    #[must_use]
    pub fn procs_file(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Whether `/proc/PID/cgroup` content `membership` is of this cgroup.
    #[must_use]
    pub fn holds(&self, membership: &str) -> bool {
        membership.lines().any(|line| {
            line.strip_prefix("0::/")
                .is_some_and(|path| path.split(['/', ' ']).any(|part| part == self.name))
        })
    }

    /// Command lines of the live processes inside, by process id.
    pub fn processes(&self) -> Result<BTreeMap<u32, String>> {
        let mut found = BTreeMap::new();
        for dir in tree(&self.path)? {
            let procs =
                fs::read_to_string(dir.join("cgroup.procs")).context("read cgroup.procs")?;
            for pid in procs.lines().filter_map(|pid| pid.parse::<u32>().ok()) {
                found.insert(pid, command_line(pid));
            }
        }
        Ok(found)
    }

    /// Ends every process inside and removes the cgroup.
    pub fn kill(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        fs::write(self.path.join("cgroup.kill"), "1").context("cgroup.kill")?;
        eventually("killed processes to end", KILL_WITHIN, || {
            let events =
                fs::read_to_string(self.path.join("cgroup.events")).context("cgroup.events")?;
            ensure!(events.contains("populated 0"), "{:?}", self.processes()?);
            Ok::<_, anyhow::Error>(())
        })?;
        for path in &self.everywhere {
            remove_tree(path)?;
        }
        Ok(())
    }
}

/// A command that joins the cgroup of `procs_file` before it starts `program`,
/// whose arguments are to follow.
pub fn command_in(procs_file: &Path, program: &Path) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
        .arg(procs_file)
        .arg(program);
    command
}

/// Removes groups without processes.
pub fn remove_tree(path: &Path) -> Result<()> {
    // A process that was just reaped may hold its cgroup a moment more.
    eventually("the cgroup to be empty", KILL_WITHIN, || {
        for dir in tree(path)?.iter().rev() {
            fs::remove_dir(dir).with_context(|| format!("remove cgroup {}", dir.display()))?;
        }
        Ok::<_, anyhow::Error>(())
    })
}

/// `path` and the directories below it, parents first; nothing when it is gone.
fn tree(path: &Path) -> Result<Vec<PathBuf>> {
    let mut dirs = Vec::from_iter(path.exists().then(|| path.to_owned()));
    let mut next = 0;
    while let Some(dir) = dirs.get(next).cloned() {
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            }
        }
        next += 1;
    }
    Ok(dirs)
}

/// Where cgroup hierarchies are mounted, and which of them is version 2.
fn hierarchies() -> Result<(Vec<PathBuf>, PathBuf)> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
    let mut all = Vec::new();
    let mut unified = None;
    for line in mounts.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        let (Some(point), Some(kind)) = (fields.get(1), fields.get(2)) else {
            continue;
        };
        match *kind {
            "cgroup" => all.push(PathBuf::from(point)),
            "cgroup2" => {
                all.push(PathBuf::from(point));
                unified = Some(PathBuf::from(point));
            }
            _ => {}
        }
    }
    Ok((
        all,
        unified.context("no cgroup2 file system is mounted on this machine")?,
    ))
}

/// The command line, or the name in brackets where there is none.
fn command_line(pid: u32) -> String {
    let proc = Path::new("/proc").join(pid.to_string());
    let line = fs::read(proc.join("cmdline")).unwrap_or_default();
    let words: Vec<_> = line
        .split(|b| *b == 0)
        .filter(|w| !w.is_empty())
        .map(String::from_utf8_lossy)
        .collect();
    if words.is_empty() {
        return format!(
            "[{}]",
            fs::read_to_string(proc.join("comm"))
                .unwrap_or_default()
                .trim()
        );
    }
    words.join(" ")
}
