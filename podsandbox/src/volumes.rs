//! A container's volumes: bind mounts below the pod's shared directory, which
//! the guest sees through virtio-fs. The mounts belong to the daemon's mount
//! namespace; the VMM's is a slave of it.
//!
//! A volume is put together in a private staging directory and then moved
//! into place. The move hands the VMM a copy with its flags, so that what is
//! read-only is never writable there; and since the volume has left the peer
//! group of its source by then, unmounting it never unmounts anything of the
//! node's.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, statvfs};

use crate::spec::{Mount, Propagation};
use crate::{Error, Result};

const NONE: Option<&str> = None;

/// Makes `shared` a mount whose submounts reach the VMM and nobody else, and
/// `stage` one whose submounts reach nobody.
pub fn prepare(shared: &Path, stage: &Path) -> Result<()> {
    for (dir, propagation) in [(shared, MsFlags::MS_SHARED), (stage, MsFlags::MS_PRIVATE)] {
        let change = |flags| mount(NONE, dir, NONE, flags, NONE);
        mount(Some(dir), dir, NONE, MsFlags::MS_BIND, NONE)
            .and_then(|()| change(MsFlags::MS_PRIVATE))
            .and_then(|()| change(propagation))
            .map_err(|error| failed(dir, error.into()))?;
    }
    Ok(())
}

/// Binds each of `mounts` that is of the node at `dir/<index>`; on failure nothing stays mounted.
pub fn bind_all(stage: &Path, dir: &Path, mounts: &[Mount]) -> Result<()> {
    make_dir(dir)?;
    for (index, volume) in mounts.iter().enumerate() {
        if volume.image.is_some() {
            continue;
        }
        if let Err(error) = bind(stage, &dir.join(index.to_string()), volume) {
            unmount_below(stage)?;
            unbind_all(dir)?;
            return Err(error);
        }
    }
    Ok(())
}

fn make_dir(dir: &Path) -> Result<()> {
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir);
    made.map_err(|source| failed(dir, source))
}

fn bind(stage: &Path, target: &Path, volume: &Mount) -> Result<()> {
    let source = &volume.host_path;
    let failed = |error: io::Error| Error::MountSource {
        path: source.clone(),
        source: error,
    };
    let name = target.file_name().unwrap_or_else(|| OsStr::new("volume"));
    let staged = stage.join(name);
    let is_dir = fs::metadata(source).map_err(failed)?.is_dir();
    for path in [&staged, target] {
        let made = if is_dir {
            fs::create_dir(path)
        } else {
            fs::File::create_new(path).map(drop)
        };
        made.map_err(failed)?;
    }
    let change = |flags| mount(NONE, &staged, NONE, flags, NONE).map_err(|e| failed(e.into()));
    // Symlinks in a volume's host path are the kubelet's and are followed, as
    // every runtime does.
    mount(
        Some(source),
        &staged,
        NONE,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        NONE,
    )
    .map_err(|e| failed(e.into()))?;
    change(
        MsFlags::MS_REC
            | match volume.propagation {
                Propagation::Private => MsFlags::MS_PRIVATE,
                // What a guest mounts is not a mount of the host's: there is nothing
                // that could travel back.
                Propagation::HostToContainer | Propagation::Bidirectional => MsFlags::MS_SLAVE,
            },
    )?;
    if volume.read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        change(flags | kept_flags(&staged).map_err(failed)?)?;
    }
    mount(Some(&staged), target, NONE, MsFlags::MS_MOVE, NONE).map_err(|e| failed(e.into()))?;
    let cleared = if is_dir {
        fs::remove_dir(&staged)
    } else {
        fs::remove_file(&staged)
    };
    cleared.map_err(failed)
}

/// A remount states all flags; those the mount has must not get lost.
fn kept_flags(path: &Path) -> io::Result<MsFlags> {
    let has = statvfs(path).map_err(io::Error::from)?.flags();
    let pairs = [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let kept = pairs.into_iter().filter(|(flag, _)| has.contains(*flag));
    Ok(kept.fold(MsFlags::empty(), |all, (_, flag)| all | flag))
}

/// Unmounts and removes whatever is below `dir`, however far [`bind_all`] came.
/// A name that is still a mount is not removed.
pub fn unbind_all(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| failed(dir, source))?,
    };
    for entry in entries {
        let path = entry.map_err(|source| failed(dir, source))?.path();
        unmount(&path)?;
        let is_dir = fs::symlink_metadata(&path)
            .map_err(|source| failed(&path, source))?
            .is_dir();
        let removed = if is_dir {
            fs::remove_dir(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(|source| failed(&path, source))?;
    }
    fs::remove_dir(dir).map_err(|source| failed(dir, source))
}

/// Detaches every mount stacked on `path`; none is no error.
fn unmount(path: &Path) -> Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(error) => return Err(failed(path, error.into())),
        }
    }
}

/// Unmounts everything at and below `dir`, so that removing it can reach
/// nothing of the node's.
pub fn unmount_below(dir: &Path) -> Result<()> {
    for path in mounts_below(dir)?.into_iter().rev() {
        unmount(&path)?;
    }
    match mounts_below(dir)?.first() {
        None => Ok(()),
        Some(left) => Err(failed(left, io::ErrorKind::ResourceBusy.into())),
    }
}

fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = Path::new("/proc/self/mountinfo");
    let text = fs::read(table).map_err(|source| failed(table, source))?;
    // proc_pid_mountinfo(5): the mount point is the fifth field.
    let points = text
        .split(|&b| b == b'\n')
        .filter_map(|line| line.split(|&b| b == b' ').nth(4));
    Ok(points
        .map(unescape)
        .filter(|path| path.starts_with(dir))
        .collect())
}

/// Blanks and backslashes stand there as `\` and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| byte == b'\\');
        let code = octal.and_then(|o| u8::from_str_radix(std::str::from_utf8(o).ok()?, 8).ok());
        bytes.push(code.unwrap_or(byte));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsStr::from_bytes(&bytes))
}

fn failed(path: &Path, source: io::Error) -> Error {
    Error::File {
        what: "volume",
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pod(tempfile::TempDir);

    impl Pod {
        fn new() -> Self {
            let pod = Self(tempfile::tempdir().unwrap());
            for dir in ["shared", "stage", "source/sub"] {
                fs::create_dir_all(pod.at(dir)).unwrap();
            }
            prepare(&pod.at("shared"), &pod.at("stage")).unwrap();
            // As on a node where systemd made everything shared.
            let source = pod.at("source");
            mount(
                Some("tmpfs"),
                &source,
                Some("tmpfs"),
                MsFlags::empty(),
                NONE,
            )
            .unwrap();
            mount(NONE, &source, NONE, MsFlags::MS_SHARED, NONE).unwrap();
            fs::create_dir(source.join("sub")).unwrap();
            mount(
                Some("tmpfs"),
                &source.join("sub"),
                Some("tmpfs"),
                MsFlags::empty(),
                NONE,
            )
            .unwrap();
            fs::write(source.join("sub/file"), "x").unwrap();
            pod
        }

        fn at(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn bind(&self, read_only: bool, propagation: Propagation) {
            let volume = Mount {
                host_path: self.at("source"),
                container_path: "/v".into(),
                read_only,
                propagation,
                id_mapping: None,
                image: None,
            };
            bind_all(&self.at("stage"), &self.at("shared/c"), &[volume]).unwrap();
        }
    }

    impl Drop for Pod {
        fn drop(&mut self) {
            unmount_below(self.0.path()).unwrap();
        }
    }

    #[test]
    fn removing_a_volume_leaves_the_nodes_own_mounts_alone() {
        for propagation in [
            Propagation::Private,
            Propagation::HostToContainer,
            Propagation::Bidirectional,
        ] {
            let pod = Pod::new();
            pod.bind(false, propagation);
            assert!(pod.at("shared/c/0/sub/file").exists());
            unbind_all(&pod.at("shared/c")).unwrap();
            assert!(pod.at("source/sub/file").exists(), "{propagation:?}");
            assert!(!pod.at("shared/c").exists());
        }
    }

    #[test]
    fn a_read_only_volume_cannot_be_written_while_its_source_can() {
        let pod = Pod::new();
        pod.bind(true, Propagation::HostToContainer);
        let error = fs::write(pod.at("shared/c/0/new"), "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        fs::write(pod.at("source/new"), "x").unwrap();
        assert!(pod.at("shared/c/0/new").exists());
    }

    #[test]
    fn a_missing_source_is_named_and_leaves_nothing() {
        let pod = Pod::new();
        let good = Mount {
            host_path: pod.at("source"),
            container_path: "/a".into(),
            read_only: false,
            propagation: Propagation::Private,
            id_mapping: None,
            image: None,
        };
        let bad = Mount {
            host_path: pod.at("nowhere"),
            ..good.clone()
        };
        let error = bind_all(&pod.at("stage"), &pod.at("shared/c"), &[good, bad]).unwrap_err();
        assert!(
            matches!(&error, Error::MountSource { path, .. } if path.ends_with("nowhere")),
            "{error}"
        );
        assert!(!pod.at("shared/c").exists());
    }

    #[test]
    fn mount_points_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescape(br"/a\040b\134c"), Path::new(r"/a b\c"));
    }
}
