//! The host's control group of a pod's VMM, below the one the kubelet made for
//! the pod, so that limits, eviction and statistics see what the pod costs.
//! Both hierarchies are served: v2, and v1 with one mount a controller.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Error, Result};

/// A killed process leaves its group once the kernel has freed its memory.
const EMPTY_WITHIN: Duration = Duration::from_secs(5);
const EMPTY_POLL: Duration = Duration::from_millis(5);
const ROOT: &str = "/sys/fs/cgroup";
/// Where the VMMs of pods without a `cgroup_parent` are charged.
pub const OWN_PARENT: &str = "/drupe";
/// Another daemon may be removing a parent that is ours together.
const MAKE_TRIES: u32 = 5;
/// v1 hierarchies that account or limit; a cpuset would need to be filled in
/// before it takes a process.
const V1_CONTROLLERS: [&str; 5] = ["memory", "cpu", "cpuacct", "pids", "blkio"];

/// Makes the group below `parent` in every hierarchy, and returns the files
/// that take its process.
pub fn make(parent: &Path, id: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for dir in dirs(parent, id)? {
        let mut tries = 0;
        while let Err(source) = fs::create_dir_all(&dir) {
            tries += 1;
            if source.kind() != io::ErrorKind::NotFound || tries == MAKE_TRIES {
                return Err(failed(&dir, source));
            }
        }
        files.push(dir.join("cgroup.procs"));
    }
    Ok(files)
}

/// Removes the parent that is nobody else's, unless some pod is in it.
pub fn remove_own_parent() {
    for dir in dirs_of(Path::new(OWN_PARENT)) {
        match fs::remove_dir(&dir) {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::ResourceBusy
                        | io::ErrorKind::DirectoryNotEmpty
                ) => {}
            Err(error) => {
                tracing::warn!(path = %dir.display(), %error, "cannot remove an empty control group");
            }
        }
    }
}

/// Kills what is left in the group and removes it; one that is gone, or could
/// never have been made, is no error. A parent that was asked for is its
/// maker's.
pub async fn remove(parent: &Path, id: &str) -> Result<()> {
    let deadline = Instant::now() + EMPTY_WITHIN;
    for dir in dirs(parent, id).unwrap_or_default() {
        loop {
            match fs::remove_dir(&dir) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(source) if Instant::now() > deadline => return Err(failed(&dir, source)),
                Err(_) => kill_all(&dir)?,
            }
            // v1 has no event for a group that became empty.
            tokio::time::sleep(EMPTY_POLL).await;
        }
    }
    Ok(())
}

fn kill_all(dir: &Path) -> Result<()> {
    let text = match fs::read_to_string(dir.join("cgroup.procs")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| failed(dir, source))?,
    };
    for pid in text
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid > 1)
    {
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(nix::Error::ESRCH) => {}
            Err(error) => return Err(failed(dir, error.into())),
        }
    }
    Ok(())
}

fn dirs(parent: &Path, id: &str) -> Result<Vec<PathBuf>> {
    if parent
        .components()
        .any(|part| !matches!(part, Component::RootDir | Component::Normal(_)))
    {
        return Err(Error::Invalid {
            field: "config.linux.cgroup_parent".to_owned(),
            why: format!("{parent:?} is not an absolute path without '..'"),
        });
    }
    Ok(dirs_of(&parent.join(format!("drupe-{id}"))))
}

/// The group in every hierarchy.
fn dirs_of(group: &Path) -> Vec<PathBuf> {
    let below = group.strip_prefix("/").unwrap_or(group);
    let root = Path::new(ROOT);
    let hierarchies = if root.join("cgroup.controllers").exists() {
        vec![root.to_owned()]
    } else {
        let mounted = V1_CONTROLLERS.iter().map(|name| root.join(name));
        mounted
            .filter(|dir| dir.join("cgroup.procs").exists())
            .collect()
    };
    hierarchies
        .into_iter()
        .map(|hierarchy| hierarchy.join(below))
        .collect()
}

fn failed(dir: &Path, source: io::Error) -> Error {
    Error::File {
        what: "control group",
        path: dir.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_group_is_removed_with_what_runs_in_it_and_may_be_gone() {
        let parent = Path::new("/drupe-unit-test");
        let files = make(parent, "p1").unwrap();
        assert!(files.iter().all(|file| file.exists()));
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        for file in &files {
            fs::write(file, child.id().to_string()).unwrap();
        }
        remove(parent, "p1").await.unwrap();
        child.wait().unwrap();
        remove(parent, "p1").await.unwrap();
        for file in files {
            fs::remove_dir(file.parent().unwrap().parent().unwrap()).unwrap();
        }
    }

    #[test]
    fn a_parent_that_climbs_is_refused() {
        assert!(matches!(
            make(Path::new("/a/../.."), "p"),
            Err(Error::Invalid { .. })
        ));
    }
}
