//! The host's devices, for containers that are privileged on it.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType};

use crate::{Error, Result};

const DEV: &str = "/dev";
/// File systems of their own, and what a container has its own of.
const LEFT_OUT: [&str; 8] = [
    "/dev/pts",
    "/dev/shm",
    "/dev/mqueue",
    "/dev/hugepages",
    "/dev/fd",
    "/dev/console",
    "/dev/ptmx",
    "/dev/tty",
];
/// More than any host has; bounds the spec.
const MAX: usize = 4096;
const PERMISSIONS: u32 = 0o7777;

/// Every device node below /dev.
pub fn of_host() -> Result<Vec<LinuxDevice>> {
    let failed = |path: &Path, source| Error::File {
        what: "device directory",
        path: path.to_owned(),
        source,
    };
    let mut devices = Vec::new();
    let mut dirs = vec![PathBuf::from(DEV)];
    while let Some(dir) = dirs.pop() {
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.map_err(|e| failed(&dir, e))?,
        };
        for entry in entries {
            let entry = entry.map_err(|e| failed(&dir, e))?;
            let path = entry.path();
            if LEFT_OUT.iter().any(|left| path == Path::new(left)) {
                continue;
            }
            // Without following links; what vanishes meanwhile is not there.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            let kind = metadata.file_type();
            if kind.is_dir() {
                dirs.push(path);
                continue;
            }
            let typ = match (kind.is_block_device(), kind.is_char_device()) {
                (true, _) => LinuxDeviceType::B,
                (_, true) => LinuxDeviceType::C,
                _ => continue,
            };
            let number = |part: u64| i64::try_from(part).unwrap_or(i64::MAX);
            devices.push(
                LinuxDeviceBuilder::default()
                    .path(path)
                    .typ(typ)
                    .major(number(major(metadata.rdev())))
                    .minor(number(minor(metadata.rdev())))
                    .file_mode(metadata.mode() & PERMISSIONS)
                    .uid(metadata.uid())
                    .gid(metadata.gid())
                    .build()?,
            );
            if devices.len() == MAX {
                tracing::warn!("more than {MAX} devices: the rest is left out");
                return Ok(devices);
            }
        }
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_devices_are_found_by_their_numbers() {
        let devices = of_host().unwrap();
        let null = devices.iter().find(|d| d.path() == Path::new("/dev/null"));
        let null = null.unwrap();
        assert_eq!((null.major(), null.minor()), (1, 3));
        assert_eq!(null.typ(), LinuxDeviceType::C);
        assert!(devices.iter().all(|d| d.path() != Path::new("/dev/ptmx")));
    }
}
