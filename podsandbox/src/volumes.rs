//! A container's volumes: bind mounts below the pod's shared directory, which
//! the guest sees through virtio-fs. The mounts belong to the daemon's mount
//! namespace; the VMM's is a slave of it.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::spec::Mount;
use crate::{Error, Result};

/// Makes `shared` a mount of its own whose submounts propagate.
pub fn prepare_shared(shared: &Path) -> Result<()> {
    let failed = |source: io::Error| Error::File { what: "shared directory", path: shared.to_owned(), source };
    let none: Option<&str> = None;
    mount(Some(shared), shared, none, MsFlags::MS_BIND, none).map_err(|e| failed(e.into()))?;
    mount(none, shared, none, MsFlags::MS_SHARED, none).map_err(|e| failed(e.into()))
}

/// Binds each of `mounts` at `dir/<index>`; on failure nothing stays mounted.
pub fn bind_all(dir: &Path, mounts: &[Mount]) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(dir);
    made.map_err(|source| Error::File { what: "volume directory", path: dir.to_owned(), source })?;
    for (index, volume) in mounts.iter().enumerate() {
        if let Err(error) = bind(&dir.join(index.to_string()), volume) {
            unbind_all(dir)?;
            return Err(error);
        }
    }
    Ok(())
}

fn bind(target: &Path, volume: &Mount) -> Result<()> {
    let source = &volume.host_path;
    let failed = |error: io::Error| Error::MountSource { path: source.clone(), source: error };
    let metadata = fs::metadata(source).map_err(failed)?;
    if metadata.is_dir() {
        fs::create_dir(target).map_err(failed)?;
    } else {
        fs::File::create_new(target).map_err(failed)?;
    }
    let none: Option<&str> = None;
    // Symlinks in a volume's host path are the kubelet's and are followed, as
    // every runtime does.
    mount(Some(source), target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .map_err(|e| failed(e.into()))?;
    if volume.read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, target, none, flags, none).map_err(|e| failed(e.into()))?;
    }
    Ok(())
}

/// Unmounts and removes whatever is below `dir`, however far [`bind_all`] came.
/// Never follows into a volume: a name that is still a mount is not removed.
pub fn unbind_all(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| failed(dir, source))?,
    };
    for entry in entries {
        let path = entry.map_err(|source| failed(dir, source))?.path();
        unmount(&path)?;
        let is_dir = fs::symlink_metadata(&path).map_err(|source| failed(&path, source))?.is_dir();
        let removed = if is_dir { fs::remove_dir(&path) } else { fs::remove_file(&path) };
        removed.map_err(|source| failed(&path, source))?;
    }
    fs::remove_dir(dir).map_err(|source| failed(dir, source))
}

/// Detaches every mount stacked on `path`; none is no error.
pub fn unmount(path: &Path) -> Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(error) => return Err(failed(path, error.into())),
        }
    }
}

fn failed(path: &Path, source: io::Error) -> Error {
    Error::File { what: "volume", path: PathBuf::from(path), source }
}
