//! The host's control group of a pod's VMM, below the one the kubelet made for
//! the pod, so that limits, eviction and statistics see what the pod costs.
//! Both hierarchies are served: v2, and v1 with one mount a controller.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::{Error, Result};

const ROOT: &str = "/sys/fs/cgroup";
/// v1 hierarchies that account or limit; a cpuset would need to be filled in
/// before it takes a process.
const V1_CONTROLLERS: [&str; 5] = ["memory", "cpu", "cpuacct", "pids", "blkio"];

/// Makes the group below `parent` in every hierarchy, and returns the files
/// that take its process.
pub fn make(parent: &Path, id: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for dir in dirs(parent, id)? {
        fs::create_dir_all(&dir).map_err(|source| failed(&dir, source))?;
        files.push(dir.join("cgroup.procs"));
    }
    Ok(files)
}

/// Removes the group; one that is gone is no error. The parent is its maker's.
pub fn remove(parent: &Path, id: &str) -> Result<()> {
    for dir in dirs(parent, id)? {
        match fs::remove_dir(&dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(failed(&dir, source)),
            _ => {}
        }
    }
    Ok(())
}

fn dirs(parent: &Path, id: &str) -> Result<Vec<PathBuf>> {
    if parent.components().any(|part| !matches!(part, Component::RootDir | Component::Normal(_))) {
        return Err(Error::Invalid {
            field: "config.linux.cgroup_parent".to_owned(),
            why: format!("{parent:?} is not an absolute path without '..'"),
        });
    }
    let below = parent.strip_prefix("/").unwrap_or(parent).join(format!("drupe-{id}"));
    let root = Path::new(ROOT);
    let hierarchies = if root.join("cgroup.controllers").exists() {
        vec![root.to_owned()]
    } else {
        let mounted = V1_CONTROLLERS.iter().map(|name| root.join(name));
        mounted.filter(|dir| dir.join("cgroup.procs").exists()).collect()
    };
    Ok(hierarchies.into_iter().map(|hierarchy| hierarchy.join(&below)).collect())
}

fn failed(dir: &Path, source: io::Error) -> Error {
    Error::File { what: "control group", path: dir.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_made_and_removed_and_may_be_gone() {
        let parent = Path::new("/drupe-unit-test");
        let files = make(parent, "p1").unwrap();
        assert!(files.iter().all(|file| file.exists()));
        remove(parent, "p1").unwrap();
        remove(parent, "p1").unwrap();
        for file in files {
            fs::remove_dir(file.parent().unwrap().parent().unwrap()).unwrap();
        }
    }

    #[test]
    fn a_parent_that_climbs_is_refused() {
        assert!(matches!(make(Path::new("/a/../.."), "p"), Err(Error::Invalid { .. })));
    }
}
