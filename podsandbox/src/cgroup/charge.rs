//! What the node has charged a pod's groups: the one its machine booted in and
//! its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{ROOT, dirs_of, failed, groups, is_unified};
use crate::{Error, Result};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Charge {
    /// Without cached files of the node, which it drops when it needs memory.
    pub memory_bytes: u64,
    /// With them.
    pub usage_bytes: u64,
    /// With those of them that were used lately: what the kubelet and cAdvisor
    /// call the working set.
    pub working_set_bytes: u64,
    pub cpu_nanos: u64,
    /// Processes and threads; none where the node does not count them.
    pub tasks: Option<u64>,
}

impl Charge {
    fn add(&mut self, other: Self) {
        let Self {
            memory_bytes,
            usage_bytes,
            working_set_bytes,
            cpu_nanos,
            tasks,
        } = other;
        for (sum, value) in [
            (&mut self.memory_bytes, memory_bytes),
            (&mut self.usage_bytes, usage_bytes),
            (&mut self.working_set_bytes, working_set_bytes),
            (&mut self.cpu_nanos, cpu_nanos),
        ] {
            *sum = sum.saturating_add(value);
        }
        self.tasks = self.tasks.zip(tasks).map(|(a, b)| a.saturating_add(b));
    }
}

/// None: there is no such group.
pub fn charge(parent: &Path, id: &str) -> Result<Option<Charge>> {
    let mut sum: Option<Charge> = None;
    for group in groups(parent, id)? {
        match (charge_of(&group)?, &mut sum) {
            (Some(charge), Some(sum)) => sum.add(charge),
            (Some(charge), None) => sum = Some(charge),
            (None, _) => {}
        }
    }
    Ok(sum)
}

/// Memory of all processes of the pod, that which they share with others in
/// proportion (PSS). The kernel walks all their pages for it.
pub fn proportional_bytes(parent: &Path, id: &str) -> Result<u64> {
    let mut sum: u64 = 0;
    for group in groups(parent, id)? {
        let Some(dir) = dirs_of(&group).into_iter().next() else {
            continue;
        };
        let procs = dir.join("cgroup.procs");
        let Some(pids) = if_there(&procs)? else {
            continue;
        };
        for pid in pids.lines() {
            let rollup = PathBuf::from(format!("/proc/{pid}/smaps_rollup"));
            let text = match fs::read_to_string(&rollup) {
                // It has ended.
                Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ESRCH as i32) => {
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                read => read.map_err(|source| failed(&rollup, source))?,
            };
            let pss = text.lines().find_map(|line| line.strip_prefix("Pss:"));
            let kib = pss.and_then(|pss| pss.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            sum = sum.saturating_add(kib.unwrap_or(0).saturating_mul(1024));
        }
    }
    Ok(sum)
}

fn charge_of(group: &Path) -> Result<Option<Charge>> {
    let below = group.strip_prefix("/").unwrap_or(group);
    let (memory, cpu, pids) = if is_unified() {
        let dir = Path::new(ROOT).join(below);
        (dir.clone(), dir.clone(), dir)
    } else {
        let of = |controller| Path::new(ROOT).join(controller).join(below);
        (of("memory"), of("cpuacct"), of("pids"))
    };
    let used = ["memory.current", "memory.usage_in_bytes"];
    let Some((path, used)) = first(&memory, &used)? else {
        return Ok(None);
    };
    let used = number(&path, &used)?;
    let path = memory.join("memory.stat");
    let stat = if_there(&path)?.unwrap_or_default();
    // With what is in groups below: v1 has it by another name.
    let cached = |key: &str| keyed(&stat, &format!("total_{key}")).or_else(|| keyed(&stat, key));
    let [unused, lately] = ["inactive_file", "active_file"].map(|key| cached(key).unwrap_or(0));
    let Some((path, text)) = first(&cpu, &["cpuacct.usage", "cpu.stat"])? else {
        return Ok(None);
    };
    let cpu_nanos = match keyed(&text, "usage_usec") {
        Some(micros) => micros.saturating_mul(1000),
        None => number(&path, &text)?,
    };
    let path = pids.join("pids.current");
    let tasks = if_there(&path)?.map(|text| number(&path, &text));
    let working_set_bytes = used.saturating_sub(unused);
    Ok(Some(Charge {
        memory_bytes: working_set_bytes.saturating_sub(lately),
        usage_bytes: used,
        working_set_bytes,
        cpu_nanos,
        tasks: tasks.transpose()?,
    }))
}

fn first(dir: &Path, names: &[&str]) -> Result<Option<(PathBuf, String)>> {
    for name in names {
        let path = dir.join(name);
        if let Some(text) = if_there(&path)? {
            return Ok(Some((path, text)));
        }
    }
    Ok(None)
}

fn if_there(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // Removed while it was open.
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENODEV as i32) => Ok(None),
        Err(source) => Err(failed(path, source)),
    }
}

fn number(path: &Path, text: &str) -> Result<u64> {
    let parsed = text.trim().parse();
    parsed.map_err(|_| -> Error { failed(path, io::ErrorKind::InvalidData.into()) })
}

fn keyed(text: &str, key: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let (_, value) = lines.find(|(name, _)| *name == key)?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::{beside, join, make_for_boot, remove};

    #[test]
    fn a_key_is_not_the_beginning_of_another() {
        let stat = "active_file_x 1\ninactive_file 7\nactive_file 5\n";
        assert_eq!(keyed(stat, "active_file"), Some(5));
        assert_eq!(keyed(stat, "file"), None);
    }

    #[tokio::test]
    async fn what_boots_beside_its_group_is_charged_for_both() {
        let parent = Path::new("/drupe-unit-test-charge/pod");
        assert_eq!(charge(parent, "p").unwrap(), None);
        let files = make_for_boot(parent, "p").unwrap();
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read line; x=$(seq 100000); read line"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        for file in &files {
            fs::write(file, child.id().to_string()).unwrap();
        }
        let before = charge(parent, "p").unwrap().unwrap();
        join(parent, "p").unwrap();
        for file in &files {
            assert_eq!(fs::read_to_string(file).unwrap(), "");
        }
        let mut input = child.stdin.take().unwrap();
        io::Write::write_all(&mut input, b"\n").unwrap();
        // Whenever the kernel has counted it.
        let used = || charge(parent, "p").unwrap().unwrap();
        let begun = std::time::Instant::now();
        while used().cpu_nanos <= before.cpu_nanos || used().memory_bytes == 0 {
            assert!(begun.elapsed().as_secs() < 10, "{:?}", used());
            std::thread::yield_now();
        }
        let now = used();
        let [all, lately, held] = [now.usage_bytes, now.working_set_bytes, now.memory_bytes];
        assert!(all >= lately && lately >= held, "{now:?}");
        assert!(now.tasks >= Some(1), "{now:?}");
        assert!(proportional_bytes(parent, "p").unwrap() > 0);
        remove(parent, "p").await.unwrap();
        remove(beside(parent), "p").await.unwrap();
        child.wait().unwrap();
        assert_eq!(charge(parent, "p").unwrap(), None);
        for dir in dirs_of(parent) {
            fs::remove_dir(&dir).unwrap();
            fs::remove_dir(dir.parent().unwrap()).unwrap();
        }
    }
}
