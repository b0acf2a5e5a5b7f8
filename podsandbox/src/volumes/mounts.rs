//! Mounts of the node's tree, changed and undone without following a link.
//!
//! What is mounted below a volume lies at a path that whoever may write the
//! volume can change at any moment: a directory renamed, a link put in its
//! place. So a mount there is reached by a descriptor, opened below a directory
//! that is the daemon's own and through no link, and never by its path.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::failed;
use super::table::Table;
use crate::Result;

const NONE: Option<&str> = None;

/// What every mount below a pod's shared directory has: no device node there is
/// one, no program there is run by the node, and none gains by its mode.
pub(super) const GUARDS: MsFlags = MsFlags::MS_NODEV
    .union(MsFlags::MS_NOSUID)
    .union(MsFlags::MS_NOEXEC);

/// Times that the table of mounts is read again because it changed meanwhile.
const ROUNDS: u32 = 100;

/// Opens `path`, which is `dir` or below it, through no link.
fn open_below(dir: &Path, path: &Path) -> io::Result<OwnedFd> {
    let dir_fd = File::open(dir)?;
    let rest = path.strip_prefix(dir).map_err(io::Error::other)?;
    let rest = match rest.as_os_str().is_empty() {
        true => Path::new("."),
        false => rest,
    };
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(&dir_fd, rest, how)?)
}

fn by_fd(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Gives the mount at `staged` and all below it [`GUARDS`], and makes `path` of
/// them read-only where `read_only` says so of it. Nothing can be mounted there
/// meanwhile but by its source, where it follows that.
pub(super) fn guard(staged: &Path, read_only: impl Fn(&Path) -> bool) -> Result<()> {
    // Where a file is mounted there is nothing below it.
    let (dir, name) = (parent(staged), staged);
    for path in Table::read()?.at_and_below(name) {
        let mut flags = GUARDS;
        if read_only(path) {
            flags |= MsFlags::MS_RDONLY;
        }
        open_below(dir, path)
            .and_then(|fd| {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags | kept_flags(&fd)?;
                Ok(mount(NONE, &by_fd(&fd), NONE, flags, NONE)?)
            })
            .map_err(|error| failed(path, error))?;
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// A remount states all flags; those the mount has must not get lost.
fn kept_flags(fd: &OwnedFd) -> io::Result<MsFlags> {
    let has = fstatvfs(fd).map_err(io::Error::from)?.flags();
    let pairs = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let kept = pairs.into_iter().filter(|(flag, _)| has.contains(*flag));
    Ok(kept.fold(MsFlags::empty(), |all, (_, flag)| all | flag))
}

/// Detaches every mount stacked on `path`, whose directory is the daemon's own,
/// with all that is mounted below; none is no error.
pub(super) fn detach(path: &Path) -> Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(error) => return Err(failed(path, error.into())),
        }
    }
}

/// Detaches what is mounted below `dir`, which somebody else may be changing,
/// and leaves what is mounted at it.
pub(super) fn detach_below(dir: &Path) -> Result<()> {
    let mut last = None;
    for _ in 0..ROUNDS {
        let table = Table::read()?;
        let below: Vec<&PathBuf> = table.at_and_below(dir).filter(|p| *p != dir).collect();
        if below.is_empty() {
            return Ok(());
        }
        for path in below.into_iter().rev() {
            let detached = open_below(dir, path).and_then(|fd| {
                // Follows the descriptor's link, which leads to no other place.
                Ok(umount2(&by_fd(&fd), MntFlags::MNT_DETACH)?)
            });
            // It has moved: the table is read again.
            last = detached.err().map(|error| failed(path, error)).or(last);
        }
    }
    Err(last.unwrap_or_else(|| failed(dir, io::ErrorKind::ResourceBusy.into())))
}

/// Unmounts everything at and below `dir`, so that removing it can reach
/// nothing of the node's. Only what is mounted on the daemon's own directories
/// is named: all that is mounted below that goes with it.
pub fn unmount_below(dir: &Path) -> Result<()> {
    for _ in 0..ROUNDS {
        let table = Table::read()?;
        let tops = table.tops(dir);
        if tops.is_empty() {
            return Ok(());
        }
        for path in tops {
            detach(path)?;
        }
    }
    Err(failed(dir, io::ErrorKind::ResourceBusy.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn tmpfs(at: &Path) {
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
    }

    /// Whoever may write a volume swaps a directory in it for a link to another
    /// one of the node, in which a mount has the same name.
    #[test]
    fn a_link_put_in_the_way_leads_to_no_mount_of_the_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let (volume, decoy) = (dir.join("volume"), dir.join("decoy"));
        for path in [volume.join("a/m"), volume.join("b"), decoy.join("m")] {
            fs::create_dir_all(path).unwrap();
        }
        tmpfs(&decoy.join("m"));
        fs::write(decoy.join("m/kept"), "").unwrap();
        symlink(&decoy, volume.join("link")).unwrap();

        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let at = |name: &str| volume.join(name);
                while !over.load(Ordering::Relaxed) {
                    fs::rename(at("a"), at("c")).unwrap();
                    fs::rename(at("link"), at("a")).unwrap();
                    fs::rename(at("a"), at("link")).unwrap();
                    fs::rename(at("c"), at("a")).unwrap();
                }
            });
            for _ in 0..2000 {
                // At whatever name the directory has just now.
                let made = open_below(&volume, &volume.join("a/m")).and_then(|fd| {
                    Ok(mount(
                        Some("tmpfs"),
                        &by_fd(&fd),
                        Some("tmpfs"),
                        MsFlags::empty(),
                        NONE,
                    )?)
                });
                if made.is_ok() {
                    detach_below(&volume).unwrap();
                }
                assert!(decoy.join("m/kept").exists());
            }
            over.store(true, Ordering::Relaxed);
        });
        unmount_below(&dir).unwrap();
        assert!(!decoy.join("m/kept").exists());
    }

    #[test]
    fn what_is_mounted_below_goes_with_what_is_mounted_above() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let top = dir.join("top");
        fs::create_dir(&top).unwrap();
        tmpfs(&top);
        tmpfs(&top);
        fs::create_dir(top.join("below")).unwrap();
        tmpfs(&top.join("below"));
        unmount_below(&dir).unwrap();
        assert_eq!(fs::read_dir(&top).unwrap().count(), 0);
        unmount_below(&dir).unwrap();
    }
}
