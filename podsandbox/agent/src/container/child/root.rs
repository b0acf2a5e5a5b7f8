//! A container's root: entered, filled with mounts and device files, then
//! closed.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, fstat, mknod};
use nix::unistd::{chdir, chown, fchdir, mkdir, pivot_root};

use super::{At, PIVOT, Result, write_file};
use crate::container::plan::{DeviceNode, MountKind, MountStep, RootSetup, Step};
use crate::sys::{self, MountAttr};

pub(super) fn enter(root: &RootSetup, terminal: bool) -> Result<()> {
    if root.cgroup_namespace {
        unshare(CloneFlags::CLONE_NEWCGROUP).at(Step::CgroupNamespace, 0)?;
    }
    // Nothing that happens to mounts here may reach the agent's namespace.
    mount(
        None::<&CStr>,
        c"/",
        None::<&CStr>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&CStr>,
    )
    .at(Step::Propagation, 0)?;
    sys::move_mount(root.tree.as_raw_fd(), PIVOT).at(Step::Root, 0)?;
    fchdir(&root.tree).at(Step::Root, 1)?;
    // pivot_root(2), "pivot_root(".", ".")": no directory for the old root.
    pivot_root(c".", c".").at(Step::Root, 2)?;

    // SAFETY: sets this process's umask.
    unsafe { libc::umask(0) };
    for (index, step) in root.mounts.iter().enumerate() {
        mount_one(step).at(Step::Mount, index)?;
    }
    // Not before: in a user namespace proc and sysfs can only be mounted where
    // others of them are in sight, and those are the agent's.
    umount2(c".", MntFlags::MNT_DETACH).at(Step::Root, 3)?;
    chdir(c"/").at(Step::Root, 4)?;
    for (index, device) in root.devices.iter().enumerate() {
        make_device(device).at(Step::Device, index)?;
    }
    for (index, (target, path)) in root.symlinks.iter().enumerate() {
        match nix::unistd::symlinkat(target.as_c_str(), nix::fcntl::AT_FDCWD, path.as_c_str()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno).at(Step::Symlink, index),
        }
    }
    if terminal {
        make_file(c"/dev/console").at(Step::Terminal, 0)?;
    }
    Ok(())
}

fn mount_one(step: &MountStep) -> sys::Result<()> {
    match attach(step) {
        Err(Errno::ENOENT) => {
            if step.directory {
                make_directories(&step.target, 0o755)?;
            } else {
                make_parent(&step.target)?;
                make_file(&step.target)?;
            }
            attach(step)
        }
        result => result,
    }
}

fn attach(step: &MountStep) -> sys::Result<()> {
    match &step.kind {
        MountKind::Tree(tree) => sys::move_mount(tree.as_raw_fd(), &step.target),
        MountKind::New {
            fs,
            source,
            flags,
            data,
            attr,
        } => {
            let data = (!data.is_empty()).then_some(data.as_c_str());
            mount(
                Some(source.as_c_str()),
                step.target.as_c_str(),
                Some(fs.as_c_str()),
                *flags,
                data,
            )?;
            if attr.is_empty() {
                return Ok(());
            }
            sys::mount_setattr(libc::AT_FDCWD, &step.target, true, *attr)
        }
    }
}

/// `mkdir -p`, without allocating.
pub(super) fn make_directories(path: &CStr, mode: u32) -> sys::Result<()> {
    let bytes = path.to_bytes();
    let mut buffer = [0u8; libc::PATH_MAX as usize];
    if bytes.len() >= buffer.len() {
        return Err(Errno::ENAMETOOLONG);
    }
    for end in 1..=bytes.len() {
        if end < bytes.len() && bytes[end] != b'/' {
            continue;
        }
        buffer[..end].copy_from_slice(&bytes[..end]);
        buffer[end] = 0;
        let prefix = CStr::from_bytes_with_nul(&buffer[..=end]).map_err(|_| Errno::EINVAL)?;
        match mkdir(prefix, Mode::from_bits_truncate(mode)) {
            // A read-only file system says so even where the directory exists.
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(Errno::EROFS) if end < bytes.len() => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn make_parent(path: &CStr) -> sys::Result<()> {
    let bytes = path.to_bytes();
    let Some(slash) = bytes
        .iter()
        .rposition(|&b| b == b'/')
        .filter(|&slash| slash > 0)
    else {
        return Ok(());
    };
    let mut buffer = [0u8; libc::PATH_MAX as usize];
    let target = buffer.get_mut(..=slash).ok_or(Errno::ENAMETOOLONG)?;
    target[..slash].copy_from_slice(&bytes[..slash]);
    let parent = CStr::from_bytes_with_nul(target).map_err(|_| Errno::EINVAL)?;
    make_directories(parent, 0o755)
}

fn make_file(path: &CStr) -> sys::Result<()> {
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    open(path, flags, Mode::from_bits_truncate(0o644)).map(drop)
}

fn make_device(device: &DeviceNode) -> sys::Result<()> {
    let kind = SFlag::from_bits_truncate(device.mode & libc::S_IFMT);
    let mode = Mode::from_bits_truncate(device.mode & 0o7777);
    let result = match mknod(device.path.as_c_str(), kind, mode, device.device) {
        Err(Errno::ENOENT) => {
            make_parent(&device.path)?;
            mknod(device.path.as_c_str(), kind, mode, device.device)
        }
        result => result,
    };
    match result {
        Ok(()) => {}
        // An image may bring its own /dev without a mount over it.
        Err(Errno::EEXIST) => return Ok(()),
        Err(errno) => return Err(errno),
    }
    if device.uid != 0 || device.gid != 0 {
        chown(
            device.path.as_c_str(),
            Some(device.uid.into()),
            Some(device.gid.into()),
        )?;
    }
    Ok(())
}

/// What closes the root once everything in it was made.
pub(super) fn restrict(root: &RootSetup) -> Result<()> {
    for (index, (path, value)) in root.sysctls.iter().enumerate() {
        write_file(path, value).at(Step::Sysctl, index)?;
    }
    for (index, path) in root.readonly.iter().enumerate() {
        make_readonly(path).at(Step::ReadOnly, index)?;
    }
    mask(root)?;
    if root.readonly_root {
        let attr = MountAttr {
            set: libc::MOUNT_ATTR_RDONLY,
            ..MountAttr::default()
        };
        sys::mount_setattr(libc::AT_FDCWD, c"/", false, attr).at(Step::ReadOnly, usize::MAX)?;
    }
    Ok(())
}

fn make_readonly(path: &CStr) -> sys::Result<()> {
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    match mount(Some(path), path, None::<&CStr>, bind, None::<&CStr>) {
        Ok(()) => {}
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        Err(errno) => return Err(errno),
    }
    let attr = MountAttr {
        set: libc::MOUNT_ATTR_RDONLY,
        ..MountAttr::default()
    };
    sys::mount_setattr(libc::AT_FDCWD, path, true, attr)
}

/// Covers files with /dev/null and directories with an empty read-only tmpfs.
fn mask(root: &RootSetup) -> Result<()> {
    if root.masked.is_empty() {
        return Ok(());
    }
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let null = open(c"/dev/null", flags, Mode::empty()).at(Step::Mask, 0)?;
    // A volume at /dev could have put something else there, to be bound over
    // /proc/kcore and the like.
    let stat = fstat(&null).at(Step::Mask, 0)?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR || stat.st_rdev != libc::makedev(1, 3) {
        return Err(Errno::ENXIO).at(Step::Mask, 0);
    }
    for (index, path) in root.masked.iter().enumerate() {
        let tree = match sys::clone_mount(null.as_fd(), c"", false) {
            Ok(tree) => tree,
            Err(errno) => return Err(errno).at(Step::Mask, index),
        };
        match sys::move_mount(tree.as_raw_fd(), path) {
            Ok(()) | Err(Errno::ENOENT) => continue,
            // The target is a directory.
            Err(Errno::ENOTDIR | Errno::EISDIR | Errno::EINVAL) => {}
            Err(errno) => return Err(errno).at(Step::Mask, index),
        }
        match mount(
            Some(c"tmpfs"),
            path.as_c_str(),
            Some(c"tmpfs"),
            MsFlags::MS_RDONLY,
            Some(c"size=0k,nr_inodes=1"),
        ) {
            // ENOTDIR: a file on the way to it, so nothing to mask.
            Ok(()) | Err(Errno::ENOTDIR | Errno::ENOENT) => {}
            Err(errno) => return Err(errno).at(Step::Mask, index),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_made_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = std::ffi::CString::new(format!("{}/a/b/c", dir.path().display())).unwrap();
        make_directories(&path, 0o755).unwrap();
        make_directories(&path, 0o755).unwrap();
        assert!(dir.path().join("a/b/c").is_dir());
        let file = std::ffi::CString::new(format!("{}/x/y/file", dir.path().display())).unwrap();
        make_parent(&file).unwrap();
        make_file(&file).unwrap();
        assert!(dir.path().join("x/y/file").is_file());
    }
}
