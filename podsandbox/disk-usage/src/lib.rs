//! What a tree of files takes on its file system, as du(1) counts: blocks and
//! inodes, a file with many links once.
//!
//! The tree is a container's to change while it is walked, by whoever likes to
//! lead the walk elsewhere. So every directory is opened by its name in the
//! descriptor of the one above, never through a symbolic link, and one on
//! another file system is not entered: whatever is renamed meanwhile, the walk
//! stays below its root. What vanishes is not counted.
//!
//! It blocks, and takes as long as the tree is large; [`Cached`] does it in the
//! background, and not more often than is worth it. Called by the supervisor
//! of pods on the host's kernel for a container's layer, and by the daemon for
//! what all of them take.
#![forbid(unsafe_code)]

mod cached;

use std::collections::HashSet;
use std::ffi::CStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, openat, statat};
use rustix::io::Errno;

pub use cached::Cached;

/// Levels that are entered, each an open descriptor for as long as the walk is
/// below it. What is deeper does not count.
const MAX_DEPTH: usize = 256;
/// Files with more than one link that are remembered, 16 bytes each; beyond,
/// each of their names counts.
const MAX_LINKED: usize = 1 << 16;
/// `st_blocks` counts in these, whatever the file system's own are.
const BLOCK: u64 = 512;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub bytes: u64,
    /// Without the root's own.
    pub inodes: u64,
}

impl std::ops::Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_add(other.bytes),
            inodes: self.inodes.saturating_add(other.inodes),
        }
    }
}

impl Usage {
    fn count(&mut self, stat: &Stat) {
        let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
        self.bytes = self.bytes.saturating_add(blocks.saturating_mul(BLOCK));
        self.inodes += 1;
    }
}

/// Of the directory at `root`, to which nobody else may lead elsewhere. One
/// that is not there takes nothing.
pub fn measure(root: &Path) -> io::Result<Usage> {
    let root = match openat(CWD, root, DIRECTORY, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(Usage::default()),
        root => root?,
    };
    let walk = Walk {
        device: fstat(&root)?.st_dev,
        usage: Usage::default(),
        linked: HashSet::new(),
    };
    walk.below(Dir::new(root)?)
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

struct Walk {
    device: u64,
    usage: Usage,
    linked: HashSet<(u64, u64)>,
}

impl Walk {
    fn below(mut self, root: Dir) -> io::Result<Usage> {
        let mut levels = vec![root];
        while let Some(level) = levels.last_mut() {
            let Some(entry) = level.next() else {
                levels.pop();
                continue;
            };
            let entry = match entry {
                // The directory itself was removed.
                Err(Errno::NOENT) => continue,
                entry => entry?,
            };
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let below = match self.count(level.fd()?, name) {
                // It has gone, or something else has come in its place.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                below => below?,
            };
            if levels.len() < MAX_DEPTH {
                levels.extend(below);
            }
        }
        Ok(self.usage)
    }

    /// Counts the entry; a directory that is to be walked comes back.
    fn count(&mut self, level: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<Option<Dir>> {
        let stat = statat(level, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            if stat.st_nlink == 1 || self.is_first(&stat) {
                self.usage.count(&stat);
            }
            return Ok(None);
        }
        if stat.st_dev != self.device {
            return Ok(None);
        }
        self.usage.count(&stat);
        let dir = openat(level, name, DIRECTORY, Mode::empty())?;
        // Something may have been mounted there, or renamed to there, since.
        let is_here = fstat(&dir)?.st_dev == self.device;
        is_here.then(|| Dir::new(dir)).transpose()
    }

    fn is_first(&mut self, stat: &Stat) -> bool {
        let id = (stat.st_dev, stat.st_ino);
        if self.linked.len() == MAX_LINKED {
            return !self.linked.contains(&id);
        }
        self.linked.insert(id)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_tree_is_measured_with_links_once_and_without_what_links_lead_to() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("tree");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(root.join("a/file"), root.join("a/b/again")).unwrap();
        symlink("/usr", root.join("link")).unwrap();
        let usage = measure(&root).unwrap();
        assert_eq!(usage.inodes, 4);
        assert!((100_000..200_000).contains(&usage.bytes), "{usage:?}");
        assert_eq!(measure(&root.join("none")).unwrap(), Usage::default());
        assert!(measure(&root.join("link")).is_err(), "a link was followed");
    }

    #[test]
    fn another_file_system_is_not_entered() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("mounted");
        fs::create_dir(&at).unwrap();
        let run = |program: &str, args: &[&str]| {
            let mut command = std::process::Command::new(program);
            assert!(command.args(args).arg(&at).status().unwrap().success());
        };
        run("mount", &["-t", "tmpfs", "t"]);
        fs::write(at.join("file"), "x").unwrap();
        let usage = measure(dir.path());
        run("umount", &[]);
        assert_eq!(usage.unwrap(), Usage::default());
    }

    #[test]
    fn a_tree_deeper_than_is_walked_ends_there() {
        let dir = tempfile::tempdir().unwrap();
        let deep: std::path::PathBuf = std::iter::repeat_n("d", MAX_DEPTH + 50).collect();
        fs::create_dir_all(dir.path().join(&deep)).unwrap();
        assert_eq!(measure(dir.path()).unwrap().inodes, MAX_DEPTH as u64);
    }

    #[test]
    fn who_swaps_directories_for_links_does_not_lead_the_walk_away() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir_all(tree.join("d")).unwrap();
        fs::create_dir(&outside).unwrap();
        for n in 0..64 {
            fs::write(outside.join(n.to_string()), vec![0; 64 << 10]).unwrap();
        }
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (d, aside, link) = (tree.join("d"), tree.join("aside"), tree.join("link"));
                while !over.load(Ordering::Relaxed) {
                    fs::rename(&d, &aside).unwrap();
                    symlink(&outside, &link).unwrap();
                    fs::rename(&link, &d).unwrap();
                    fs::remove_file(&d).unwrap();
                    fs::rename(&aside, &d).unwrap();
                }
            });
            for _ in 0..2000 {
                let usage = measure(&tree).unwrap();
                assert!(usage.bytes < 64 << 10, "{usage:?}");
            }
            over.store(true, Ordering::Relaxed);
        });
    }
}
