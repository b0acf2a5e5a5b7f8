//! Walks over directory trees of containers, in small steps between which
//! other tasks run: the agent has one thread and a tree may have a million
//! files.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::task::yield_now;

/// Entries handled before other tasks get a turn: some 5 ms where a system
/// call takes 80 µs.
const BATCH: usize = 64;

/// Where trees to be deleted are moved: a name that no container has.
const TRASH: &str = "/run/drupe/scratch/trash";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    pub bytes: u64,
    pub inodes: u64,
}

/// Blocks and inodes of the tree at `root`, as du(1) counts: a file with many
/// links once. What vanishes meanwhile is not counted.
pub async fn measure(root: PathBuf) -> io::Result<Size> {
    let mut size = Size::default();
    let mut linked = HashSet::new();
    let mut dirs = vec![root];
    let mut handled = 0;
    while let Some(dir) = dirs.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if metadata.is_dir() {
                dirs.push(entry.path());
            } else if metadata.nlink() > 1 && !linked.insert(metadata.ino()) {
                continue;
            }
            size.bytes = size
                .bytes
                .saturating_add(metadata.blocks().saturating_mul(512));
            size.inodes += 1;
            handled += 1;
            if handled % BATCH == 0 {
                yield_now().await;
            }
        }
    }
    Ok(size)
}

/// Moves the tree at `path` out of the way, at once, and deletes it in the
/// background. One that does not exist is no error.
pub fn discard(path: &Path) -> io::Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let trash = Path::new(TRASH);
    fs::create_dir_all(trash)?;
    let target = trash.join(COUNTER.fetch_add(1, Ordering::Relaxed).to_string());
    match fs::rename(path, &target) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    tokio::spawn(async move {
        if let Err(error) = delete(target.clone()).await {
            eprintln!("drupe-agent: cannot delete {}: {error}", target.display());
        }
    });
    Ok(())
}

/// Deletes a tree. Symbolic links are removed, never followed: nothing else
/// has access to the tree any more.
async fn delete(root: PathBuf) -> io::Result<()> {
    let mut dirs = vec![(root, false)];
    let mut handled = 0;
    while let Some((dir, emptied)) = dirs.pop() {
        if emptied {
            fs::remove_dir(&dir)?;
            continue;
        }
        dirs.push((dir.clone(), true));
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push((entry.path(), false));
            } else {
                fs::remove_file(entry.path())?;
            }
            handled += 1;
            if handled % BATCH == 0 {
                yield_now().await;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_tree_is_measured_with_links_once_and_deleted_whole() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("tree");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(root.join("a/file"), root.join("a/b/again")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("link")).unwrap();
        let size = measure(root.clone()).await.unwrap();
        assert_eq!(size.inodes, 4);
        assert!((100_000..200_000).contains(&size.bytes), "{size:?}");

        delete(root.clone()).await.unwrap();
        assert!(!root.exists());
        assert!(Path::new("/etc").exists());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_tree_that_is_not_there_has_no_size() {
        assert_eq!(
            measure("/nonexistent/tree".into()).await.unwrap(),
            Size::default()
        );
    }
}
