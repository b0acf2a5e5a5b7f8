//! Devices in a pod with its own kernel: block devices of the node are disks of
//! the pod; a few others its kernel has itself; the rest it cannot have.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{major, minor};

use super::on_host::Owner;
use super::{DeviceError, DeviceSlot, Kind, Node};

/// What the guest's kernel has by the same path, with the same use.
const OWN: [&str; 10] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/fuse",
    "/dev/net/tun",
    "/dev/loop-control",
    "/dev/kmsg",
];

pub fn has(path: &Path) -> bool {
    OWN.iter().any(|own| path == Path::new(own))
}

/// Fails for the first that a guest cannot have.
pub fn check(nodes: &[Node]) -> Result<(), DeviceError> {
    let cannot = |node: &&Node| !matches!(node.kind, Kind::Block | Kind::Guests);
    match nodes.iter().find(cannot) {
        None => Ok(()),
        Some(node) => Err(DeviceError::NotInGuest {
            field: node.field.clone(),
            path: node.host_path.clone(),
            kind: node.kind,
        }),
    }
}

/// A block device that is to be a disk of the pod, read-only unless one of the
/// container's device files may be written.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    pub node: &'a Node,
    pub read_only: bool,
}

/// The distinct block devices among `nodes`.
pub fn disks(nodes: &[Node]) -> Vec<Wanted<'_>> {
    let mut disks: Vec<Wanted<'_>> = Vec::new();
    for node in nodes.iter().filter(|node| node.kind == Kind::Block) {
        let same =
            |disk: &&mut Wanted<'_>| (disk.node.major, disk.node.minor) == (node.major, node.minor);
        let read_only = !node.access.write;
        match disks.iter_mut().find(same) {
            Some(disk) => disk.read_only &= read_only,
            None => disks.push(Wanted { node, read_only }),
        }
    }
    disks
}

/// Opens the block device of a slot; its size in bytes. May wait for it.
pub fn open(node: &Node, slot: &DeviceSlot) -> Result<(File, u64), DeviceError> {
    /// Of which its size is a multiple in the guest.
    const SECTOR: u64 = 512;
    let failed = |source: io::Error| DeviceError::Path {
        field: node.field.clone(),
        path: node.host_path.clone(),
        source,
    };
    let mut file = fs::File::options()
        .read(true)
        .write(!slot.read_only)
        .open(&node.host_path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let device = metadata.rdev();
    let is_it = metadata.file_type().is_block_device()
        && (major(device), minor(device)) == (slot.major.into(), slot.minor.into());
    if !is_it {
        return Err(DeviceError::Changed {
            field: node.field.clone(),
            path: node.host_path.clone(),
        });
    }
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    Ok((file, bytes / SECTOR * SECTOR))
}

/// How the agent is to make the container's device files; `sizes` are those of
/// the block devices of `slots`.
pub fn requests(
    nodes: &[Node],
    slots: &[DeviceSlot],
    sizes: &[u64],
    owner: Owner,
) -> Vec<agent_api::Device> {
    use agent_api::device::Source;
    let source = |node: &Node| match node.kind {
        Kind::Block => {
            let is_it = |(slot, _): &(&DeviceSlot, &u64)| {
                (slot.major, slot.minor) == (node.major, node.minor)
            };
            let (slot, &bytes) = slots.iter().zip(sizes).find(is_it)?;
            Some(Source::Disk(agent_api::BlockDisk {
                slot: slot.slot,
                bytes,
                read_only: slot.read_only,
            }))
        }
        _ => Some(Source::GuestPath(node.host_path.display().to_string())),
    };
    nodes
        .iter()
        .map(|node| {
            let (uid, gid) = owner.of(node);
            agent_api::Device {
                path: node.container_path.display().to_string(),
                source: source(node),
                access: node.access.to_string(),
                mode: node.mode,
                uid,
                gid,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Access;

    fn node(path: &str, kind: Kind, minor: u32, access: &str) -> Node {
        Node {
            field: format!("config.devices[{path}]"),
            host_path: path.into(),
            container_path: path.into(),
            access: access.parse::<Access>().unwrap(),
            kind,
            major: 7,
            minor,
            mode: None,
            uid: None,
            gid: None,
            of_user: false,
        }
    }

    #[test]
    fn a_block_device_named_twice_is_one_disk_that_can_be_written_if_either_may() {
        let nodes = [
            node("/dev/a", Kind::Block, 0, "r"),
            node("/dev/null", Kind::Guests, 0, "rw"),
            node("/dev/b", Kind::Block, 1, "rm"),
            node("/dev/c", Kind::Block, 0, "rwm"),
        ];
        let disks = disks(&nodes);
        let shown: Vec<_> = disks.iter().map(|d| (d.node.minor, d.read_only)).collect();
        assert_eq!(shown, [(0, false), (1, true)]);
        check(&nodes).unwrap();
    }

    #[test]
    fn what_a_guest_cannot_have_is_named_with_who_can() {
        let error = check(&[node("/dev/dri/card0", Kind::Character, 0, "rw")]).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::FailedPrecondition);
        let text = error.to_string();
        for part in [
            "config.devices[",
            "/dev/dri/card0",
            "its own kernel",
            "\"host\"",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
