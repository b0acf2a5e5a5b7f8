//! The disk that holds what a pod's containers write: a sparse ext4 image,
//! copied from a template that is formatted once.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use disk_usage::Usage;
use nix::unistd::{Whence, lseek};

use crate::{Error, Result};

fn failed(path: &Path, source: io::Error) -> Error {
    Error::File {
        what: "scratch disk",
        path: path.to_owned(),
        source,
    }
}

/// One template is made at a time, also when many first pods come at once.
static MAKING: Mutex<()> = Mutex::new(());

/// Returns the formatted template for disks of `gib`, made on first use.
pub fn template(dir: &Path, gib: u32) -> Result<PathBuf> {
    let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let path = dir.join(format!("template-{gib}.ext4"));
    if path.exists() {
        return Ok(path);
    }
    let partial = dir.join(format!("template-{gib}.partial"));
    let file = File::create(&partial).map_err(|e| failed(&partial, e))?;
    file.set_len(u64::from(gib) << 30)
        .map_err(|e| failed(&partial, e))?;
    // No journal: the disk does not outlive a crash of its pod. No resize
    // inode and lazy tables: fewer blocks to copy for every pod.
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-b", "4096", "-L", "scratch"])
        .args(["-O", "^has_journal,^resize_inode,metadata_csum"])
        .args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
        .arg(&partial)
        // What it says is looked at below.
        .env("LC_ALL", "C")
        .output()
        .map_err(|e| failed(Path::new("mkfs.ext4"), e))?;
    if !output.status.success() {
        fs::remove_file(&partial).map_err(|e| failed(&partial, e))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        // Its exit code is the same for every failure.
        if stderr.contains(nix::Error::ENOSPC.desc()) {
            return Err(failed(&path, nix::Error::ENOSPC.into()));
        }
        let lines: Vec<&str> = stderr.lines().map(str::trim).collect();
        let stderr = lines.join("; ");
        return Err(Error::Tool {
            program: "mkfs.ext4",
            stderr,
        });
    }
    file.sync_all().map_err(|e| failed(&partial, e))?;
    fs::rename(&partial, &path).map_err(|e| failed(&path, e))?;
    Ok(path)
}

/// Makes a pod's disk: the template's data blocks, its holes left as holes.
pub fn create(template: &Path, path: &Path) -> Result<File> {
    let result = copy_sparse(template, path);
    if result.is_err() {
        remove(path)?;
    }
    result.map_err(|e| failed(path, e))
}

fn copy_sparse(template: &Path, path: &Path) -> io::Result<File> {
    let from = File::open(template)?;
    let to = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; 256 * 1024];
    let mut offset = 0;
    while let Some(start) = seek(&from, offset, Whence::SeekData)? {
        let end = seek(&from, start, Whence::SeekHole)?.unwrap_or(length);
        offset = start;
        while offset < end {
            let wanted = usize::try_from(end - offset)
                .unwrap_or(buffer.len())
                .min(buffer.len());
            let read = from.read_at(&mut buffer[..wanted], offset)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all_at(&buffer[..read], offset)?;
            offset += read as u64;
        }
    }
    Ok(to)
}

/// The next data or hole at or after `offset`; None past the last data.
fn seek(file: &File, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    match lseek(file, offset, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Removes a pod's disk; one that is gone is no error.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(path, error)),
        _ => Ok(()),
    }
}

/// What pods have written, as far as it is disks: files in `dir`.
pub fn disks(dir: &Path) -> Result<Usage> {
    /// `st_blocks` counts in these, whatever the file system's own are.
    const BLOCK: u64 = 512;
    let mut usage = Usage::default();
    for path in entries(dir).map_err(|e| failed(dir, e))? {
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(metadata) => {
                usage.bytes += metadata.blocks() * BLOCK;
                usage.inodes += 1;
            }
            // A pod was stopped in between.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&path, error)),
        }
    }
    Ok(usage)
}

/// As far as it is trees, of pods on the host's kernel: directories in `dirs`.
/// One that cannot be measured does not keep the others from being.
pub fn trees(dirs: &[PathBuf]) -> io::Result<Usage> {
    let mut all = Usage::default();
    for path in dirs
        .iter()
        .map(|dir| entries(dir))
        .collect::<io::Result<Vec<_>>>()?
        .concat()
    {
        match fs::symlink_metadata(&path).map(|metadata| metadata.is_dir()) {
            Ok(true) => {}
            // A disk, or one that has just gone.
            Ok(false) | Err(_) => continue,
        }
        let (of_dir, usage) = (
            Usage {
                bytes: 0,
                inodes: 1,
            },
            disk_usage::measure(&path),
        );
        match usage {
            Ok(usage) => all = all + of_dir + usage,
            Err(error) => {
                tracing::warn!(?path, %error, "cannot measure what a pod has written");
            }
        }
    }
    Ok(all)
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    entries.map(|entry| Ok(entry?.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_disk_is_a_clean_file_system_that_costs_almost_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let template = template(dir.path(), 10).unwrap();
        let disk = dir.path().join("disk");
        create(&template, &disk).unwrap();
        let check = Command::new("fsck.ext4")
            .arg("-fn")
            .arg(&disk)
            .output()
            .unwrap();
        assert!(
            check.status.success(),
            "{}",
            String::from_utf8_lossy(&check.stdout)
        );
        let metadata = fs::metadata(&disk).unwrap();
        assert_eq!(metadata.len(), 10 << 30);
        assert!(
            metadata.blocks() * 512 < 4 << 20,
            "{} blocks",
            metadata.blocks()
        );
    }

    #[test]
    fn disks_and_trees_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.ext4"), vec![1; 8192]).unwrap();
        fs::create_dir_all(dir.path().join("pod/c/upper")).unwrap();
        fs::write(dir.path().join("pod/c/upper/file"), vec![1; 100_000]).unwrap();
        let disks = disks(dir.path()).unwrap();
        assert_eq!((disks.bytes, disks.inodes), (8192, 1));
        let missing = dir.path().join("none");
        let trees = trees(&[dir.path().to_owned(), missing.clone()]).unwrap();
        assert_eq!(trees.inodes, 4);
        assert!((100_000..150_000).contains(&trees.bytes), "{trees:?}");
        assert_eq!(super::disks(&missing).unwrap(), Usage::default());
    }
}
