//! What a container has in /dev: device files, and links to what is in /proc.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use super::plan::DeviceNode;
use super::spec::{SpecError, c_string};

/// Files the pod's device list may name.
pub const MAX_DEVICES: usize = 256;

/// The device files every container has (runtime spec, "Default Devices"),
/// those of `guest`, then those asked for: of two with one path the last.
pub fn nodes(
    asked: &[LinuxDevice],
    guest: Vec<DeviceNode>,
    defaults: bool,
) -> Result<Vec<DeviceNode>, SpecError> {
    if asked.len() > MAX_DEVICES {
        let field = "linux.devices";
        return Err(SpecError::TooMany {
            field,
            count: asked.len(),
            max: MAX_DEVICES,
        });
    }
    const DEFAULTS: [(&str, u32, u32); 6] = [
        ("/dev/null", 1, 3),
        ("/dev/zero", 1, 5),
        ("/dev/full", 1, 7),
        ("/dev/random", 1, 8),
        ("/dev/urandom", 1, 9),
        ("/dev/tty", 5, 0),
    ];
    let mut nodes = Vec::new();
    for (path, major, minor) in DEFAULTS.into_iter().filter(|_| defaults) {
        nodes.push(DeviceNode {
            path: c_string("linux.devices", path)?,
            mode: libc::S_IFCHR | 0o666,
            device: libc::makedev(major, minor),
            uid: 0,
            gid: 0,
        });
    }
    for device in guest {
        nodes.retain(|known| known.path != device.path);
        nodes.push(device);
    }
    for device in asked {
        nodes.retain(|known| known.path.as_bytes() != device.path().as_os_str().as_bytes());
        let path = device.path().to_string_lossy().into_owned();
        if !path.starts_with('/') {
            return Err(SpecError::NotAbsolute {
                field: "linux.devices",
                value: path,
            });
        }
        let kind = match device.typ() {
            LinuxDeviceType::B => libc::S_IFBLK,
            LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
            LinuxDeviceType::P => libc::S_IFIFO,
            LinuxDeviceType::A => return Err(SpecError::Device { path }),
        };
        let (Ok(major), Ok(minor)) = (device.major().try_into(), device.minor().try_into()) else {
            return Err(SpecError::Device { path });
        };
        nodes.push(DeviceNode {
            path: c_string("linux.devices", &path)?,
            mode: kind | device.file_mode().unwrap_or(0o666) & 0o7777,
            device: libc::makedev(major, minor),
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        });
    }
    Ok(nodes)
}

pub fn symlinks() -> Vec<(CString, CString)> {
    [
        (c"/proc/self/fd", c"/dev/fd"),
        (c"/proc/self/fd/0", c"/dev/stdin"),
        (c"/proc/self/fd/1", c"/dev/stdout"),
        (c"/proc/self/fd/2", c"/dev/stderr"),
        (c"pts/ptmx", c"/dev/ptmx"),
    ]
    .map(|(target, path)| (target.to_owned(), path.to_owned()))
    .into()
}
