//! The devices of a request as device files and rules of its spec: disks of the
//! node, and devices of the guest's own.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path};

use agent_api::Device;
use agent_api::device::Source;
use nix::sys::stat::{major, minor};
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};

use crate::rootfs::{Rootfs, RootfsError};

/// Of one container.
const MAX_DEVICES: usize = 256;
/// What a device file has that states nothing.
const MODE: u32 = 0o666;

#[derive(Debug, thiserror::Error)]
pub enum NodeDeviceError {
    #[error("the container has {count} devices, more than {MAX_DEVICES}")]
    TooMany { count: usize },
    #[error("device {path:?} has no source")]
    NoSource { path: String },
    #[error("the pod's own kernel has no {guest_path}, which the container is to have as {path}")]
    NotThere { path: String, guest_path: String },
    #[error(transparent)]
    Disk(#[from] RootfsError),
    #[error("a device of the container")]
    Oci(#[from] OciSpecError),
}

/// Device files and the rules that say what may be done with them.
pub type Devices = (Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>);

/// What the container gets for `asked`; disks are `rootfs`'s to give back, when
/// this fails as well.
pub async fn resolve(asked: &[Device], rootfs: &mut Rootfs) -> Result<Devices, NodeDeviceError> {
    if asked.len() > MAX_DEVICES {
        let count = asked.len();
        return Err(NodeDeviceError::TooMany { count });
    }
    let (mut files, mut rules) = Devices::default();
    for device in asked {
        let (kind, (major, minor)) = match &device.source {
            Some(Source::Disk(disk)) => (LinuxDeviceType::B, rootfs.take_disk(disk).await?),
            Some(Source::GuestPath(path)) => (LinuxDeviceType::C, of_guest(device, path)?),
            None => {
                let path = device.path.clone();
                return Err(NodeDeviceError::NoSource { path });
            }
        };
        // The kernel has 12 and 20 bits for them.
        let (major, minor) = (major as i64, minor as i64);
        files.push(
            LinuxDeviceBuilder::default()
                .path(device.path.as_str())
                .typ(kind)
                .major(major)
                .minor(minor)
                .file_mode(device.mode.unwrap_or(MODE))
                .uid(device.uid.unwrap_or(0))
                .gid(device.gid.unwrap_or(0))
                .build()?,
        );
        rules.push(
            LinuxDeviceCgroupBuilder::default()
                .allow(true)
                .typ(kind)
                .major(major)
                .minor(minor)
                .access(device.access.clone())
                .build()?,
        );
    }
    Ok((files, rules))
}

/// The numbers of the guest's own device at `guest_path`.
fn of_guest(device: &Device, guest_path: &str) -> Result<(u64, u64), NodeDeviceError> {
    let path = Path::new(guest_path);
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    let found = (path.starts_with("/dev") && path.components().all(plain))
        .then(|| fs::symlink_metadata(path).ok())
        .flatten()
        .filter(|metadata| metadata.file_type().is_char_device());
    match found {
        Some(metadata) => Ok((major(metadata.rdev()), minor(metadata.rdev()))),
        None => Err(NodeDeviceError::NotThere {
            path: device.path.clone(),
            guest_path: guest_path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_device_below_dev_is_the_guests() {
        let device = Device {
            path: "/dev/x".into(),
            ..Device::default()
        };
        assert_eq!(of_guest(&device, "/dev/null").unwrap(), (1, 3));
        for bad in [
            "/dev/../dev/null",
            "/dev",
            "/dev/nothing",
            "dev/null",
            "/proc/self/exe",
        ] {
            let refused = of_guest(&device, bad).unwrap_err();
            assert!(matches!(refused, NodeDeviceError::NotThere { .. }), "{bad}");
        }
    }
}
