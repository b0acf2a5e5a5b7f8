//! Containers' logs on the node: files below a directory that the kubelet makes
//! for each pod, where a pod with a volume of /var/log could put links.
//!
//! ```text
//! /var/log/pods / NAMESPACE_NAME_UID / CONTAINER / 0.log
//! links followed  no link from here on, and a plain file at the end
//! ```
//! An operator may keep logs on another disk; below that, neither the kubelet
//! nor a rotation makes a link. Those in /var/log/containers lead to here, not
//! away.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::{Error, Result};

/// As the kubelet makes its own: readable by the node's log collectors.
const MODE: u32 = 0o640;

/// Opens the log `path` of a pod whose logs are in `directory`, which it is
/// below, to append to it.
pub fn open(directory: &Path, path: &Path) -> Result<File> {
    let failed = |source| Error::LogFile {
        path: path.to_owned(),
        source,
    };
    let (above, below) = split(directory, path).map_err(failed)?;
    // A FIFO must not hold up the pod.
    let flags = OFlag::O_WRONLY
        | OFlag::O_APPEND
        | OFlag::O_CREAT
        | OFlag::O_NONBLOCK
        | OFlag::O_NOCTTY
        | OFlag::O_CLOEXEC;
    let file = beneath(&above, &below, flags, Mode::from_bits_truncate(MODE)).map_err(failed)?;
    let file = File::from(file);
    if file.metadata().map_err(failed)?.is_file() {
        Ok(file)
    } else {
        Err(failed(io::Error::new(
            io::ErrorKind::InvalidInput,
            "is no plain file: remove it",
        )))
    }
}

/// Removes the log of a container that never was, unless an earlier one has
/// written to it.
pub fn remove_if_empty(directory: &Path, path: &Path) -> io::Result<()> {
    let (above, below) = split(directory, path)?;
    let (Some(parent), Some(name)) = (below.parent(), below.file_name()) else {
        return Ok(());
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let parent = beneath(&above, parent, flags, Mode::empty())?;
    let of_file = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let file = match openat2(&parent, name, how(of_file, Mode::empty())) {
        Err(Errno::ENOENT) => return Ok(()),
        file => File::from(file?),
    };
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.len() == 0 {
        unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir)?;
    }
    Ok(())
}

/// Where links are followed, and the rest of the way.
fn split(directory: &Path, path: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let above = directory.parent().unwrap_or(directory);
    let below = path.strip_prefix(above);
    let leaves = path.components().any(|part| part == Component::ParentDir);
    match below {
        Ok(below) if path.starts_with(directory) && !leaves => {
            Ok((above.to_owned(), below.to_owned()))
        }
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("is not below the pod's log directory {directory:?}"),
        )),
    }
}

fn how(flags: OFlag, mode: Mode) -> OpenHow {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    OpenHow::new().flags(flags).mode(mode).resolve(resolve)
}

fn beneath(above: &Path, below: &Path, flags: OFlag, mode: Mode) -> io::Result<OwnedFd> {
    let above = fs::File::open(above)?;
    match openat2(&above, below, how(flags, mode)) {
        Ok(file) => Ok(file),
        Err(Errno::ELOOP) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a symbolic link is in its place or on the way below the directory of all pods' logs: \
             remove it, and look for a pod that can write there",
        )),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// The log directory of a pod, with one of its container.
    fn pod() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("pods/shop_web_uid");
        fs::create_dir_all(directory.join("c")).unwrap();
        (dir, directory)
    }

    fn refused(directory: &Path, path: &Path) -> String {
        let error = open(directory, path).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::FailedPrecondition);
        error.sentence()
    }

    #[test]
    fn a_log_is_made_and_appended_to() {
        let (_dir, directory) = pod();
        let path = directory.join("c/0.log");
        for line in ["one\n", "two\n"] {
            let mut file = open(&directory, &path).unwrap();
            file.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        // As crictl gives it.
        open(&directory, &directory.join("./c.log")).unwrap();
        assert!(directory.join("c.log").is_file());
    }

    #[test]
    fn logs_may_be_kept_on_another_disk() {
        let (dir, directory) = pod();
        let link = dir.path().join("linked");
        symlink(directory.parent().unwrap(), &link).unwrap();
        let through = link.join("shop_web_uid");
        open(&through, &through.join("c/0.log")).unwrap();
        assert!(directory.join("c/0.log").is_file());
    }

    #[test]
    fn a_link_that_a_pod_has_planted_leads_nowhere() {
        let (dir, directory) = pod();
        let crontab = dir.path().join("crontab");
        fs::write(&crontab, "").unwrap();
        // In the place of the log, of the container's directory, of the pod's.
        let log = directory.join("c/0.log");
        symlink(&crontab, &log).unwrap();
        symlink(dir.path(), directory.join("d")).unwrap();
        let pods = directory.parent().unwrap();
        symlink(dir.path(), pods.join("shop_other_uid")).unwrap();
        for (directory, path) in [
            (directory.clone(), log.clone()),
            (directory.clone(), directory.join("d/crontab")),
            (
                pods.join("shop_other_uid"),
                pods.join("shop_other_uid/crontab"),
            ),
        ] {
            let said = refused(&directory, &path);
            assert!(said.contains("symbolic link"), "{said}");
            assert!(said.contains(&*path.to_string_lossy()), "{said}");
            // Nor is it removed as an empty log would be.
            let _refused = remove_if_empty(&directory, &path);
            assert!(crontab.exists());
        }
        // Not even to make a file where there is none.
        fs::remove_file(&log).unwrap();
        symlink(dir.path().join("new"), &log).unwrap();
        refused(&directory, &log);
        assert!(!dir.path().join("new").exists());
    }

    #[test]
    fn what_is_no_file_is_refused_and_not_waited_for() {
        let (_dir, directory) = pod();
        let path = directory.join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        // Somebody reads from it, so that it opens.
        let _reader = File::options().read(true).write(true).open(&path).unwrap();
        assert!(refused(&directory, &path).contains("no plain file"));
        let dir = open(&directory, &directory.join("c")).unwrap_err();
        assert!(dir.sentence().contains("directory"), "{}", dir.sentence());
    }

    #[test]
    fn what_is_not_below_the_pods_directory_is_refused() {
        let (dir, directory) = pod();
        for path in [dir.path().join("x.log"), directory.join("../x.log")] {
            let error = open(&directory, &path).unwrap_err();
            let said = error.sentence();
            assert!(!dir.path().join("x.log").exists(), "{said}");
            assert!(!dir.path().join("pods/x.log").exists(), "{said}");
        }
    }

    #[test]
    fn only_an_empty_log_is_removed() {
        let (_dir, directory) = pod();
        let path = directory.join("c/0.log");
        remove_if_empty(&directory, &path).unwrap();
        fs::write(&path, "said").unwrap();
        remove_if_empty(&directory, &path).unwrap();
        assert!(path.exists());
        fs::write(&path, "").unwrap();
        remove_if_empty(&directory, &path).unwrap();
        assert!(!path.exists());
    }
}
