//! A container's /dev in a user namespace, whose root may make no device
//! files: the agent makes the tmpfs and what is in it, for that root to own.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::mount::MsFlags;
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, mkdirat, mknodat};
use nix::unistd::fchownat;

use super::plan::{DeviceNode, MountKind, MountStep};
use crate::sys;
use crate::userns::IdRange;

#[derive(Debug, thiserror::Error)]
pub enum DevError {
    #[error("cannot make a tmpfs ({options}) for /dev")]
    Mount { options: String, source: io::Error },
    #[error("cannot make the device {path}")]
    Node { path: String, source: io::Error },
    #[error("the owner {uid}:{gid} of the device {path} is not in the pod's user namespace")]
    Owner { path: String, uid: u32, gid: u32 },
    #[error(
        "the device {path} is not below a /dev of the container's own, where alone a user namespace can have devices"
    )]
    Place { path: String },
}

/// Turns the step that mounts a tmpfs at /dev into one that attaches a tree
/// with `devices` in it, of which none is left to be made.
pub fn replace(
    steps: &mut [MountStep],
    devices: &mut Vec<DeviceNode>,
    ids: IdRange,
) -> Result<(), DevError> {
    let dev = steps.iter_mut().find_map(|step| match &step.kind {
        MountKind::New {
            fs, flags, data, ..
        } if fs.as_c_str() == c"tmpfs" && step.target.as_c_str() == c"/dev" => {
            let options = data.to_string_lossy().into_owned();
            Some((*flags, options, &mut step.kind))
        }
        _ => None,
    });
    let Some((flags, options, kind)) = dev else {
        return match devices.first() {
            None => Ok(()),
            Some(device) => Err(DevError::Place { path: name(device) }),
        };
    };
    let tree = mount(flags, &options, ids).map_err(|errno| DevError::Mount {
        options,
        source: errno.into(),
    })?;
    for device in devices.drain(..) {
        make(&tree, &device, ids)?;
    }
    *kind = MountKind::Tree(tree);
    Ok(())
}

fn name(device: &DeviceNode) -> String {
    device.path.to_string_lossy().into_owned()
}

fn mount(flags: MsFlags, options: &str, ids: IdRange) -> sys::Result<OwnedFd> {
    let fs = sys::fsopen(c"tmpfs")?;
    let root = ids.root();
    let owner = [format!("uid={root}"), format!("gid={root}")];
    let options = options.split(',').filter(|option| !option.is_empty());
    for option in options.chain(owner.iter().map(String::as_str)) {
        let text = |text: &str| CString::new(text).map_err(|_| Errno::EINVAL);
        match option.split_once('=') {
            Some((key, value)) => sys::fsconfig_string(fs.as_fd(), &text(key)?, &text(value)?)?,
            None => sys::fsconfig_flag(fs.as_fd(), &text(option)?)?,
        }
    }
    sys::fsconfig_create(fs.as_fd())?;
    let pairs = [
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MsFlags::MS_STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
        (MsFlags::MS_NOATIME, libc::MOUNT_ATTR_NOATIME),
    ];
    let pairs = pairs.into_iter().filter(|(flag, _)| flags.contains(*flag));
    sys::fsmount(fs.as_fd(), pairs.fold(0, |all, (_, bit)| all | bit))
}

fn make(tree: &OwnedFd, device: &DeviceNode, ids: IdRange) -> Result<(), DevError> {
    let path = name(device);
    let below = Path::new(&path).strip_prefix("/dev");
    let Ok(below) = below else {
        return Err(DevError::Place { path });
    };
    let (Some(uid), Some(gid)) = (ids.in_guest(device.uid), ids.in_guest(device.gid)) else {
        let (uid, gid) = (device.uid, device.gid);
        return Err(DevError::Owner { path, uid, gid });
    };
    let own = |at: &Path, uid: u32, gid: u32| {
        let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
        fchownat(tree, at, Some(uid.into()), Some(gid.into()), flags)
    };
    let work = || -> sys::Result<()> {
        let parents: Vec<&Path> = below.ancestors().skip(1).collect();
        for dir in parents
            .into_iter()
            .rev()
            .filter(|dir| *dir != Path::new(""))
        {
            match mkdirat(tree, dir, Mode::from_bits_truncate(0o755)) {
                Ok(()) => own(dir, ids.root(), ids.root())?,
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        let kind = SFlag::from_bits_truncate(device.mode & libc::S_IFMT);
        let mode = Mode::from_bits_truncate(device.mode & 0o7777);
        mknodat(tree, below, kind, mode, device.device)?;
        // Whatever the umask is.
        fchmodat(tree, below, mode, FchmodatFlags::FollowSymlink)?;
        own(below, uid, gid)
    };
    work().map_err(|errno| DevError::Node {
        path: path.clone(),
        source: errno.into(),
    })
}
