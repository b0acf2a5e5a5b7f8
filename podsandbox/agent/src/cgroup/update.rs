//! Changing the limits of a cgroup in which processes run: all or none.

use std::fs;

use oci_spec::runtime::LinuxResources;

use super::limits::settings;
use super::{Cgroup, CgroupError};

impl Cgroup {
    /// Sets what `resources` names and leaves the rest. A limit that cannot be
    /// set takes those back that were. Waits for the kernel to drop caches.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let settings = settings(resources)?;
        let memory = settings.iter().find(|s| s.file == "memory.max");
        if let Some(limit) = memory.and_then(|setting| setting.value.parse().ok()) {
            self.make_room(limit)?;
        }
        let mut before: Vec<(String, String)> = Vec::new();
        for setting in settings {
            // A file that cannot be read is no limit: nothing to take back.
            let value = self.read(&setting.file).ok();
            match self.set(&setting) {
                Ok(()) => before.extend(value.map(|value| (setting.file, value))),
                Err(error) => {
                    self.take_back(&before);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn take_back(&self, before: &[(String, String)]) {
        for (file, value) in before.iter().rev() {
            // An empty write would not reach the kernel.
            let value = if value.is_empty() { "\n" } else { value };
            if let Err(error) = self.write(file, value) {
                eprintln!("drupe-agent: cannot take a limit back: {error}");
            }
        }
    }

    /// The kernel would end processes of a container that is over a new limit.
    /// Here its caches are dropped, and one that still does not fit is left as
    /// it is.
    fn make_room(&self, limit: u64) -> Result<(), CgroupError> {
        let used = || {
            let text = self.read_if_there("memory.current")?;
            Ok::<u64, CgroupError>(text.and_then(|t| t.trim().parse().ok()).unwrap_or(0))
        };
        let excess = used()?.saturating_sub(limit);
        if excess == 0 {
            return Ok(());
        }
        // It fails when less could be dropped: what is left tells.
        let dropped = self.write("memory.reclaim", &excess.to_string());
        match used()? {
            used if used > limit => {
                if let Err(error) = dropped {
                    eprintln!("drupe-agent: {error}");
                }
                Err(CgroupError::InUse { used, limit })
            }
            _ => Ok(()),
        }
    }

    /// The OOM killer's preference for every process in here. One that has
    /// just ended needs none.
    pub fn set_oom_score(&self, score: i32) -> Result<(), CgroupError> {
        for pid in self.processes()? {
            match fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
                Err(source)
                    if !matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) =>
                {
                    return Err(CgroupError::OomScore { pid, score, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Not the kernel's, but with files that take what is written to them.
    fn cgroup(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::create(dir.path().join("c")).unwrap();
        for (file, value) in files {
            fs::write(cgroup.path().join(file), value).unwrap();
        }
        (dir, cgroup)
    }

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    fn first_line(cgroup: &Cgroup, file: &str) -> String {
        let text = fs::read_to_string(cgroup.path().join(file)).unwrap();
        text.lines().next().unwrap_or_default().to_owned()
    }

    #[test]
    fn a_limit_that_cannot_be_set_takes_the_others_back() {
        let (_dir, cgroup) = cgroup(&[
            ("memory.current", "100\n"),
            ("memory.max", "7777\n"),
            ("cpu.max", "max 100000\n"),
        ]);
        let error = cgroup
            .update(&resources(
                r#"{"memory":{"limit":4096},"cpu":{"quota":5000,"period":10000},"pids":{"limit":9}}"#,
            ))
            .unwrap_err();
        assert!(matches!(error, CgroupError::Absent { .. }), "{error}");
        assert_eq!(first_line(&cgroup, "memory.max"), "7777");
        assert_eq!(first_line(&cgroup, "cpu.max"), "max 100000");
    }

    #[test]
    fn a_container_that_would_not_fit_keeps_its_limit() {
        let (_dir, cgroup) = cgroup(&[
            ("memory.current", "9000\n"),
            ("memory.max", "10000\n"),
            ("memory.reclaim", ""),
        ]);
        let limits = resources(r#"{"memory":{"limit":4096}}"#);
        let error = cgroup.update(&limits).unwrap_err().to_string();
        assert!(error.contains("9000") && error.contains("4096"), "{error}");
        assert_eq!(first_line(&cgroup, "memory.reclaim"), "4904");
        assert_eq!(first_line(&cgroup, "memory.max"), "10000");
    }
}
