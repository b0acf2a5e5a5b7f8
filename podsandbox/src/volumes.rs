//! The volumes of a pod's containers: bind mounts below the pod's shared
//! directory, which the guest sees through virtio-fs. The mounts belong to the
//! daemon's mount namespace; the VMM's is a slave of it. A bind is freed with
//! the last container that has it in its record; the driver counts.
//!
//! A volume is put together in a private staging directory and then moved
//! into place. The move hands the VMM a copy with its flags, so that what is
//! read-only is never writable there; and since the volume has left the peer
//! group of its source by then, unmounting it never unmounts anything of the
//! node's.

mod choice;
mod mounts;
mod table;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::statvfs;

use crate::spec::{Mount, Propagation};
use crate::{Error, Result};
use choice::choose;
pub use choice::{Access, Bind, Source, View};
pub use mounts::unmount_below;
use mounts::{GUARDS, detach, detach_below, guard};
use table::Table;
pub(crate) use table::unescape;

/// What the shared directory itself holds: an empty file or directory for each
/// bind. A guest cannot write there, whatever it does to its monitor.
const SHARED_OPTIONS: &str = "mode=0700,size=64k,nr_inodes=4096";

const NONE: Option<&str> = None;

/// Makes `shared` a small file system of its own whose submounts reach the
/// monitor and nobody else, and `stage` a mount whose submounts reach nobody.
pub fn prepare(shared: &Path, stage: &Path) -> Result<()> {
    let made = [
        (shared, Some("tmpfs"), GUARDS, Some(SHARED_OPTIONS)),
        (stage, None, MsFlags::MS_BIND, None),
    ];
    for (dir, kind, flags, options) in made {
        let source = kind.map_or(dir, Path::new);
        mount(Some(source), dir, kind, flags, options)
            .map_err(|error| failed(dir, error.into()))?;
    }
    for (dir, propagation) in [(shared, MsFlags::MS_SHARED), (stage, MsFlags::MS_PRIVATE)] {
        let change = |flags| mount(NONE, dir, NONE, flags, NONE);
        change(MsFlags::MS_PRIVATE)
            .and_then(|()| change(propagation))
            .map_err(|error| failed(dir, error.into()))?;
    }
    Ok(())
}

/// Where a volume's host path leads: symlinks in it are the kubelet's and are
/// followed. One that is not there becomes a directory, as with every runtime:
/// a hostPath volume without a type promises no more than that.
pub fn find_source(path: &Path) -> Result<PathBuf> {
    let failed = |source| Error::MountSource {
        path: path.to_owned(),
        source,
    };
    match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut make = fs::DirBuilder::new();
            make.recursive(true).mode(0o755);
            make.create(path).map_err(failed)?;
            fs::canonicalize(path).map_err(failed)
        }
        found => found.map_err(failed),
    }
}

/// The binds that show `volumes`, for each one; `there` are the pod's. Of the
/// node's files it makes only sources that are not there.
pub fn plan(there: &[Bind], volumes: &[Mount], uid: &str) -> Result<Vec<Bind>> {
    let mut binds: Vec<Bind> = Vec::with_capacity(volumes.len());
    let mut table = None;
    for volume in volumes {
        let source = source(volume, &mut table)?;
        // Two of a container's own may be the same as well.
        let bind = choose(there.iter().chain(&binds), source, volume, uid);
        binds.push(bind);
    }
    Ok(binds)
}

fn source(volume: &Mount, table: &mut Option<Table>) -> Result<Source> {
    let failed = |error: io::Error| Error::MountSource {
        path: volume.host_path.clone(),
        source: error,
    };
    let path = find_source(&volume.host_path)?;
    let metadata = fs::metadata(&path).map_err(failed)?;
    let flags = statvfs(&path).map_err(|e| failed(e.into()))?.flags();
    let has_mounts = metadata.is_dir()
        && match table {
            Some(table) => table.has_below(&path),
            None => table.insert(Table::read()?).has_below(&path),
        };
    Ok(Source {
        device: metadata.dev(),
        inode: metadata.ino(),
        flags: flags.bits(),
        view: View::of(volume, has_mounts),
    })
}

/// Makes those of `binds`, one for each of `volumes`, that are not there yet,
/// each below `shared` by its name. On failure none of them stays.
pub fn bind_all(stage: &Path, shared: &Path, volumes: &[Mount], binds: &[Bind]) -> Result<()> {
    let mut made: Vec<&Bind> = Vec::new();
    for (volume, wanted) in volumes.iter().zip(binds) {
        let target = shared.join(&wanted.name);
        // Nothing else is called so.
        if target.symlink_metadata().is_ok() {
            continue;
        }
        made.push(wanted);
        if let Err(error) = bind(stage, &target, volume, wanted.access) {
            unbind(stage, wanted)?;
            for bind in made {
                unbind(shared, bind)?;
            }
            return Err(error);
        }
    }
    Ok(())
}

fn bind(stage: &Path, target: &Path, volume: &Mount, access: Access) -> Result<()> {
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
    // Private by now, where it is to be so with all that is below: nothing
    // can be mounted there any more.
    guard(&staged, |path| match access {
        Access::Write => false,
        Access::Read => path == staged,
        Access::ReadRecursively => true,
    })?;
    // Never a link: the directory is the daemon's own, and this says so.
    let flags = nix::libc::O_PATH | nix::libc::O_NOFOLLOW;
    let place = fs::File::options()
        .read(true)
        .custom_flags(flags)
        .open(target);
    let place = place.map_err(failed)?;
    let kind = place.metadata().map_err(failed)?.file_type();
    if kind.is_dir() != is_dir || kind.is_symlink() {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    mount(Some(&staged), path.as_str(), NONE, MsFlags::MS_MOVE, NONE)
        .map_err(|e| failed(e.into()))?;
    if volume.propagation == Propagation::Private && is_dir {
        let_go_below(target)?;
    }
    let cleared = if is_dir {
        fs::remove_dir(&staged)
    } else {
        fs::remove_file(&staged)
    };
    cleared.map_err(failed)
}

/// The VMM has a copy of all that is mounted below a volume; here it would only
/// be in the node's way, which could not remove a directory on which something
/// is mounted in any copy of this namespace.
fn let_go_below(target: &Path) -> Result<()> {
    if !Table::read()?.has_below(target) {
        return Ok(());
    }
    let alone = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, target, NONE, alone, NONE).map_err(|error| failed(target, error.into()))?;
    detach_below(target)
}

/// Unmounts and removes a bind, however far [`bind_all`] came.
pub fn unbind(shared: &Path, bind: &Bind) -> Result<()> {
    let path = shared.join(&bind.name);
    detach(&path)?;
    let is_dir = match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| failed(&path, source))?.is_dir(),
    };
    // A name that is still a mount is not removed.
    let removed = if is_dir {
        fs::remove_dir(&path)
    } else {
        fs::remove_file(&path)
    };
    removed.map_err(|source| failed(&path, source))
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
    use std::sync::mpsc;

    use nix::mount::{MntFlags, umount2};
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    use nix::sys::statvfs::FsFlags;

    use super::*;

    struct Pod {
        dir: tempfile::TempDir,
        /// Has a mount namespace as the VMM's, for as long as this is held.
        _vmm: mpsc::Sender<()>,
        vmm_root: PathBuf,
    }

    /// A thread with a copy of the mounts that follows them; where its root is.
    fn follow_mounts() -> (mpsc::Sender<()>, PathBuf) {
        let (hold, held) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
            mount(NONE, "/", NONE, flags, NONE).unwrap();
            tell.send(nix::unistd::gettid()).unwrap();
            // Ends when the other end is dropped.
            assert!(held.recv().is_err());
        });
        let thread = told.recv().unwrap();
        (
            hold,
            PathBuf::from(format!("/proc/self/task/{thread}/root")),
        )
    }

    impl Pod {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for name in ["shared", "stage", "source/sub"] {
                fs::create_dir_all(dir.path().join(name)).unwrap();
            }
            let at = |name: &str| dir.path().join(name);
            prepare(&at("shared"), &at("stage")).unwrap();
            let (vmm, vmm_root) = follow_mounts();
            let pod = Self {
                dir,
                _vmm: vmm,
                vmm_root,
            };
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
            self.dir.path().join(name)
        }

        fn volume(&self, read_only: bool, propagation: Propagation) -> Mount {
            Mount {
                host_path: self.at("source"),
                container_path: "/v".into(),
                read_only,
                recursive_read_only: false,
                propagation,
                id_mapping: None,
                image: None,
            }
        }

        /// The bind, and where the VMM sees it.
        fn bind(&self, volume: &Mount) -> (Bind, PathBuf) {
            let volumes = [volume.clone()];
            let bind = plan(&[], &volumes, "u1").unwrap().remove(0);
            let binds = [bind.clone()];
            bind_all(&self.at("stage"), &self.at("shared"), &volumes, &binds).unwrap();
            let shared = self.at("shared");
            let seen = self.vmm_root.join(shared.strip_prefix("/").unwrap());
            let seen = seen.join(&bind.name);
            (bind, seen)
        }

        fn shared(&self) -> Vec<PathBuf> {
            let entries = fs::read_dir(self.at("shared")).unwrap();
            entries.map(|entry| entry.unwrap().path()).collect()
        }
    }

    impl Drop for Pod {
        fn drop(&mut self) {
            unmount_below(self.dir.path()).unwrap();
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
            let (bind, seen) = pod.bind(&pod.volume(false, propagation));
            assert!(seen.join("sub/file").exists());
            unbind(&pod.at("shared"), &bind).unwrap();
            assert!(pod.at("source/sub/file").exists(), "{propagation:?}");
            assert!(pod.shared().is_empty() && !seen.exists());
            unbind(&pod.at("shared"), &bind).unwrap();
        }
    }

    #[test]
    fn the_node_may_remove_what_was_mounted_below_a_volume_that_does_not_follow() {
        let pod = Pod::new();
        let (_, seen) = pod.bind(&pod.volume(false, Propagation::Private));
        umount2(&pod.at("source/sub"), MntFlags::MNT_DETACH).unwrap();
        fs::remove_dir(pod.at("source/sub")).unwrap();
        assert!(seen.exists());

        let pod = Pod::new();
        let (_, seen) = pod.bind(&pod.volume(false, Propagation::Private));
        umount2(&pod.at("source/sub"), MntFlags::MNT_DETACH).unwrap();
        assert!(seen.join("sub/file").exists(), "it has followed");
    }

    #[test]
    fn no_mount_of_a_volume_has_devices_or_programs() {
        for propagation in [Propagation::Private, Propagation::HostToContainer] {
            let pod = Pod::new();
            let null = pod.at("source/sub/null");
            mknod(
                &null,
                SFlag::S_IFCHR,
                Mode::from_bits_retain(0o666),
                makedev(1, 3),
            )
            .unwrap();
            fs::write(&null, "x").unwrap();
            let (_, seen) = pod.bind(&pod.volume(false, propagation));
            let error = fs::write(seen.join("sub/null"), "x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            let shared = pod
                .vmm_root
                .join(pod.at("shared").strip_prefix("/").unwrap());
            for path in [shared, seen.clone(), seen.join("sub")] {
                let has = statvfs(&path).unwrap().flags();
                let guards = FsFlags::ST_NODEV | FsFlags::ST_NOSUID | FsFlags::ST_NOEXEC;
                assert!(has.contains(guards), "{path:?}: {has:?}");
            }
            // The node's own mounts are as they were.
            fs::write(&null, "x").unwrap();
        }
    }

    #[test]
    fn the_shared_directory_holds_little() {
        let pod = Pod::new();
        let error = fs::write(pod.at("shared/large"), vec![0; 1 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        fs::remove_file(pod.at("shared/large")).unwrap();
        let full = (0..10_000).find_map(|n| fs::File::create(pod.at(&format!("shared/{n}"))).err());
        assert_eq!(full.unwrap().kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_read_only_volume_cannot_be_written_while_its_source_can() {
        let pod = Pod::new();
        let (_, bound) = pod.bind(&pod.volume(true, Propagation::HostToContainer));
        let error = fs::write(bound.join("new"), "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        fs::write(pod.at("source/new"), "x").unwrap();
        assert!(bound.join("new").exists());
        // What is mounted below it is not the volume.
        fs::write(bound.join("sub/new"), "x").unwrap();
    }

    #[test]
    fn a_recursively_read_only_volume_cannot_be_written_below_either() {
        let pod = Pod::new();
        let (_, bound) = pod.bind(&Mount {
            recursive_read_only: true,
            ..pod.volume(true, Propagation::Private)
        });
        for path in ["new", "sub/new"] {
            let error = fs::write(bound.join(path), "x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{path}");
        }
        fs::write(pod.at("source/sub/new"), "x").unwrap();
    }

    #[test]
    fn containers_that_name_a_directory_by_two_paths_share_one_bind() {
        let pod = Pod::new();
        let (whole, sub) = (pod.at("whole"), pod.at("sub"));
        fs::create_dir_all(whole.join("sub")).unwrap();
        std::os::unix::fs::symlink(whole.join("sub"), &sub).unwrap();
        let volume = |path: &Path| Mount {
            host_path: path.to_owned(),
            ..pod.volume(false, Propagation::Private)
        };
        let first = plan(&[], &[volume(&whole.join("sub"))], "u1").unwrap();
        let second = plan(&first, &[volume(&sub), volume(&whole)], "u1").unwrap();
        assert_eq!(first[0], second[0]);
        assert_ne!(first[0], second[1]);
    }

    #[test]
    fn a_missing_source_becomes_a_directory_and_what_cannot_is_named() {
        use std::os::unix::fs::PermissionsExt;
        let pod = Pod::new();
        let good = pod.volume(false, Propagation::Private);
        let (late, missing) = (pod.at("late"), pod.at("not/there"));
        let of = |path: &Path| Mount {
            host_path: path.to_owned(),
            ..good.clone()
        };
        let is_named = |error: &Error, name: &str| matches!(error, Error::MountSource { path, .. } if path.ends_with(name));
        plan(&[], &[of(&missing)], "u1").unwrap();
        let made = fs::metadata(&missing).unwrap();
        assert!(made.is_dir());
        assert_eq!(made.permissions().mode() & 0o777, 0o755);
        fs::write(pod.at("file"), "").unwrap();
        let error = plan(&[], &[of(&pod.at("file/below"))], "u1").unwrap_err();
        assert!(is_named(&error, "file/below"), "{error}");

        let volumes = [good.clone(), of(&late)];
        let binds = plan(&[], &volumes, "u1").unwrap();
        fs::remove_dir(&late).unwrap();
        let error = bind_all(&pod.at("stage"), &pod.at("shared"), &volumes, &binds).unwrap_err();
        assert!(is_named(&error, "late"), "{error}");
        assert!(pod.shared().is_empty());
    }
}
