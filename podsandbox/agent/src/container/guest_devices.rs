//! The guest's devices, of which a privileged container gets files.
//!
//! A container that is privileged in a guest may do all that root of the guest
//! may, by a file that it makes itself if need be: nothing here is a boundary.
//! What is left out is what a program that looks for something to use would
//! harm its own pod with:
//!
//! * **Disks**: the scratch disk and those of images and volumes. A tool that
//!   takes every empty or unmounted disk for its own would write over the root
//!   of another container. So of the block devices only those are given that
//!   have no hardware behind them: loop, RAM, network and mapped ones.
//! * **What the agent and the host talk by**: vsock, and the ports and consoles
//!   to which the kernel and the agent write.
//! * **Terminals**: a container has its own.
//!
//! Nothing makes files here when a device appears, as in any container. Loop
//! devices do when they are asked for, so files of the first few are there
//! beforehand, as on a node.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::device_files::MAX_DEVICES;
use super::plan::DeviceNode;
use super::spec::{SpecError, c_string};

const DEV: &str = "/dev";

/// Where sysfs has block devices by number: links to what they hang on.
const BLOCKS: &str = "/sys/dev/block";

/// How names of the character devices begin that are left out.
const LEFT_OUT: [&str; 6] = ["console", "hvc", "ptmx", "tty", "vport", "vsock"];

/// Those that everybody may open where a device manager has set them up: they
/// ask for rights themselves where it takes some.
const FOR_ALL: [&str; 2] = ["/dev/fuse", "/dev/net/tun"];

const LOOP_CONTROL: &str = "/dev/loop-control";
const LOOP_MAJOR: u32 = 7;
/// As many as a node has that was never asked for one.
const LOOPS: u32 = 8;

/// How deep directories of devices are: /dev/bus/usb/001.
const MAX_DEPTH: usize = 4;

/// Files of the guest's devices; with `everybodys` only those that any user of
/// the guest may open, for one whose root is not the guest's.
pub fn nodes(everybodys: bool) -> Result<Vec<DeviceNode>, SpecError> {
    below(Path::new(DEV), Path::new(BLOCKS), everybodys)
}

fn below(dev: &Path, blocks: &Path, everybodys: bool) -> Result<Vec<DeviceNode>, SpecError> {
    let failed = |path: &Path, source| SpecError::GuestDevices {
        path: path.to_owned(),
        source,
    };
    let own = fs::symlink_metadata(dev).map_err(|e| failed(dev, e))?.dev();
    let mut nodes = Vec::new();
    let mut dirs = vec![(dev.to_owned(), 0)];
    while let Some((dir, depth)) = dirs.pop() {
        for entry in fs::read_dir(&dir).map_err(|e| failed(&dir, e))? {
            let path = entry.map_err(|e| failed(&dir, e))?.path();
            let metadata = match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata.map_err(|e| failed(&path, e))?,
            };
            let kind = metadata.file_type();
            // Other file systems have terminals and the like.
            if kind.is_dir() && metadata.dev() == own && depth < MAX_DEPTH {
                dirs.push((path, depth + 1));
                continue;
            }
            let number = metadata.rdev();
            let given = match (kind.is_char_device(), kind.is_block_device()) {
                (true, _) => !is_left_out(&path),
                (_, true) => is_virtual(blocks, number),
                _ => false,
            };
            if given {
                nodes.push(node(&path, metadata.mode(), number)?);
            }
        }
    }
    add_loops(&mut nodes)?;
    if everybodys {
        nodes.retain(|node| node.mode & 0o006 == 0o006);
    }
    if nodes.len() > MAX_DEVICES {
        // The directory is the guest's, and so in reach of such a container.
        eprintln!("drupe-agent: more than {MAX_DEVICES} devices: the rest is left out");
        nodes.truncate(MAX_DEVICES);
    }
    Ok(nodes)
}

fn node(path: &Path, mode: u32, device: u64) -> Result<DeviceNode, SpecError> {
    let all = FOR_ALL.iter().any(|known| path == Path::new(known));
    let permissions = if all { 0o666 } else { mode & 0o7777 };
    Ok(DeviceNode {
        path: c_string("/dev", &path.to_string_lossy())?,
        mode: mode & libc::S_IFMT | permissions,
        device,
        uid: 0,
        gid: 0,
    })
}

fn is_left_out(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    LEFT_OUT.iter().any(|prefix| name.starts_with(prefix))
}

/// One that cannot be looked at may be a disk.
fn is_virtual(blocks: &Path, device: u64) -> bool {
    let name = format!("{}:{}", libc::major(device), libc::minor(device));
    let target: PathBuf = fs::read_link(blocks.join(name)).unwrap_or_default();
    let parts: Vec<_> = target.iter().collect();
    parts.windows(2).any(|two| two == ["devices", "virtual"])
}

fn add_loops(nodes: &mut Vec<DeviceNode>) -> Result<(), SpecError> {
    let has = |nodes: &[DeviceNode], path: &str| {
        let mut paths = nodes.iter().map(|node| node.path.to_bytes());
        paths.any(|known| known == path.as_bytes())
    };
    if !has(nodes, LOOP_CONTROL) {
        return Ok(());
    }
    for number in 0..LOOPS {
        let path = format!("/dev/loop{number}");
        if !has(nodes, &path) {
            let mode = libc::S_IFBLK | 0o660;
            let device = libc::makedev(LOOP_MAJOR, number);
            nodes.push(node(Path::new(&path), mode, device)?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_disk_is_known_by_what_it_hangs_on() {
        let dir = tempfile::tempdir().unwrap();
        for (number, target) in [
            ("7:0", "../../devices/virtual/block/loop0"),
            ("254:0", "../../devices/platform/virtio0/block/vda"),
            (
                "259:1",
                "../../devices/platform/virtio0/virtual/block/vda/vda1",
            ),
        ] {
            symlink(target, dir.path().join(number)).unwrap();
        }
        let is_virtual = |major, minor| is_virtual(dir.path(), libc::makedev(major, minor));
        assert!(is_virtual(7, 0));
        assert!(!is_virtual(254, 0) && !is_virtual(259, 1));
        assert!(!is_virtual(8, 0), "one that sysfs does not tell of");
    }

    #[test]
    fn what_the_agent_lives_on_is_left_out() {
        for name in ["vsock", "vport1p0", "hvc0", "ttyS0", "tty", "console"] {
            assert!(is_left_out(&Path::new(DEV).join(name)), "{name}");
        }
        for name in ["fuse", "net/tun", "kmsg", "loop-control", "hwrng"] {
            assert!(!is_left_out(&Path::new(DEV).join(name)), "{name}");
        }
    }

    #[test]
    fn the_first_loop_devices_are_there_before_they_are_asked_for() {
        let control = |path| node(Path::new(path), libc::S_IFCHR | 0o600, 1).unwrap();
        let mut nodes = vec![control(LOOP_CONTROL), control("/dev/loop3")];
        add_loops(&mut nodes).unwrap();
        assert_eq!(nodes.len(), 9);
        let mut none = vec![control("/dev/kmsg")];
        add_loops(&mut none).unwrap();
        assert_eq!(none.len(), 1);
    }

    #[test]
    fn devices_of_everybody_keep_their_numbers() {
        let null = below(Path::new(DEV), Path::new(BLOCKS), true).unwrap();
        let null = null
            .iter()
            .find(|node| node.path.as_c_str() == c"/dev/null");
        assert_eq!(null.unwrap().device, libc::makedev(1, 3));
        let fuse = node(Path::new("/dev/fuse"), libc::S_IFCHR | 0o600, 1).unwrap();
        assert_eq!(fuse.mode & 0o777, 0o666);
    }
}
