//! A layer's file whose cached pages nobody else reads (`images.private_cache`).
//!
//! The node's kernel caches pages by file. So each container gets a clone: a file
//! of its own that shares the layer's blocks on the disk and none of its pages. It
//! has no name and goes with its last descriptor, also when nobody is there to
//! remove it. Only file systems that share blocks between files can do that:
//! Btrfs, and XFS with reflink, its default.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ioctl_ficlone, open};

/// Opens a clone of the file at `path`, for reading only.
///
/// # Errors
/// The file system has no clones, or is full of what describes them.
pub fn open_alone(path: &Path) -> io::Result<File> {
    let shared = File::open(path)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    let clone = nameless_in(dir)?;
    ioctl_ficlone(&clone, &shared)?;
    // Whoever gets it is not to write.
    File::open(format!("/proc/self/fd/{}", clone.as_raw_fd()))
}

/// Whether files in `dir`, which exists, can be cloned.
///
/// # Errors
/// They cannot.
pub fn try_in(dir: &Path) -> io::Result<()> {
    let (file, clone) = (nameless_in(dir)?, nameless_in(dir)?);
    Ok(ioctl_ficlone(&clone, &file)?)
}

fn nameless_in(dir: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    open(dir, flags, Mode::RUSR)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{IoSliceMut, Read};
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    use super::*;

    const LEN: usize = 1 << 20;

    /// A file system with clones, mounted until this is dropped.
    struct Mounted(tempfile::TempDir);

    impl Mounted {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (disk, at) = (dir.path().join("disk"), dir.path().join("at"));
            File::create(&disk).unwrap().set_len(256 << 20).unwrap();
            fs::create_dir(&at).unwrap();
            run(Command::new("mkfs.btrfs").arg("-q").arg(&disk));
            run(Command::new("mount")
                .args(["-o", "loop"])
                .args([&disk, &at]));
            Self(dir)
        }
    }

    impl Drop for Mounted {
        fn drop(&mut self) {
            run(Command::new("umount").arg(self.0.path().join("at")));
        }
    }

    fn run(command: &mut Command) {
        assert!(command.status().unwrap().success(), "{command:?}");
    }

    /// Whether the first page is in the node's cache.
    fn is_cached(file: &File) -> bool {
        let mut page = [0; 4096];
        let mut into = [IoSliceMut::new(&mut page)];
        match preadv2(file, &mut into, 0, ReadWriteFlags::NOWAIT) {
            Ok(read) => read == 4096,
            Err(Errno::AGAIN) => false,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn what_others_have_read_is_not_cached_for_who_has_a_clone() {
        let mounted = Mounted::new();
        let path = mounted.0.path().join("at/layer");
        fs::write(&path, vec![7; LEN]).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        let shared = File::open(&path).unwrap();
        assert!(is_cached(&shared));

        let mut alone = open_alone(&path).unwrap();
        let other = open_alone(&path).unwrap();
        assert!(!is_cached(&alone), "as if others had read it");
        let mut read = Vec::new();
        alone.read_to_end(&mut read).unwrap();
        assert!(read == vec![7; LEN]);
        assert!(is_cached(&alone) && !is_cached(&other));

        assert_eq!(alone.metadata().unwrap().nlink(), 0);
        let names = fs::read_dir(path.parent().unwrap()).unwrap();
        assert_eq!(names.count(), 1);
        assert!(rustix::io::write(&alone, b"x").is_err());
        try_in(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_file_system_without_clones_is_told() {
        // A tmpfs, which has none.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("layer");
        fs::write(&path, b"layer").unwrap();
        let error = open_alone(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        try_in(dir.path()).unwrap_err();
    }
}
