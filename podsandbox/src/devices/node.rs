//! What the node has at the paths that are asked for. A path may be a link, or
//! a directory with devices below it.

use std::fmt;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::{Access, DeviceError};

/// Of one container; a directory may have them all.
const MAX_NODES: usize = 1024;
/// Entries looked at below directories, devices or not.
const MAX_ENTRIES: usize = 16384;
const PERMISSIONS: u32 = 0o7777;
/// File systems of their own, and what a container has its own of.
const LEFT_OUT: [&str; 8] = [
    "pts",
    "shm",
    "fd",
    "mqueue",
    "console",
    ".lxc",
    ".lxd-mounts",
    ".udev",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Block,
    Character,
    Fifo,
    /// No device of the node: the pod's own kernel has one by this path.
    Guests,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Block => "a block device",
            Self::Character | Self::Guests => "a character device",
            Self::Fifo => "a FIFO",
        })
    }
}

/// A device that a container is to have.
#[derive(Clone, Debug)]
pub struct Ask {
    /// What asks for it, for messages.
    pub field: String,
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    pub access: Access,
    /// None for CRI's devices, which are as they are on the node.
    pub stated: Option<Stated>,
}

/// What a CDI file says of a device; the rest is as on the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stated {
    pub kind: Option<Kind>,
    pub number: Option<(u32, u32)>,
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// A device of the node, and where and how a container has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub field: String,
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    pub access: Access,
    pub kind: Kind,
    pub major: u32,
    pub minor: u32,
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Where nothing says whose it is, it is the container's user's.
    pub of_user: bool,
}

/// The devices behind `asked`, of which a later one takes the place of another
/// at its path. What `is_guests` says of a path, the node need not have.
pub fn find(asked: &[Ask], is_guests: impl Fn(&Path) -> bool) -> Result<Vec<Node>, DeviceError> {
    let mut nodes: Vec<Node> = Vec::new();
    let mut found = Vec::new();
    for ask in asked {
        found.clear();
        look(ask, &is_guests, &mut found)?;
        for node in found.drain(..) {
            nodes.retain(|other| other.container_path != node.container_path);
            nodes.push(node);
        }
        if nodes.len() > MAX_NODES {
            return Err(DeviceError::TooMany { max: MAX_NODES });
        }
    }
    Ok(nodes)
}

fn look(
    ask: &Ask,
    is_guests: &impl Fn(&Path) -> bool,
    found: &mut Vec<Node>,
) -> Result<(), DeviceError> {
    let node = |host_path: &Path, container_path: &Path, kind, (major, minor)| {
        let stated = ask.stated.unwrap_or_default();
        Node {
            field: ask.field.clone(),
            host_path: host_path.to_owned(),
            container_path: container_path.to_owned(),
            access: ask.access,
            kind,
            major,
            minor,
            mode: stated.mode,
            uid: stated.uid,
            gid: stated.gid,
            of_user: ask.stated.is_some(),
        }
    };
    if is_guests(&ask.host_path) {
        found.push(node(
            &ask.host_path,
            &ask.container_path,
            Kind::Guests,
            (0, 0),
        ));
        return Ok(());
    }
    if let Some(stated) = &ask.stated
        && let (Some(kind), Some(number)) = (stated.kind, stated.number)
    {
        found.push(node(&ask.host_path, &ask.container_path, kind, number));
        return Ok(());
    }
    let failed = |path: &Path, source| DeviceError::Path {
        field: ask.field.clone(),
        path: path.to_owned(),
        source,
    };
    let path = fs::canonicalize(&ask.host_path).map_err(|e| failed(&ask.host_path, e))?;
    let metadata = fs::metadata(&path).map_err(|e| failed(&path, e))?;
    let of_node = |path: &Path, container_path: &Path, metadata: &Metadata| {
        let (kind, number) = kind_of(metadata)?;
        let kind = if is_guests(path) { Kind::Guests } else { kind };
        let mut node = node(path, container_path, kind, number);
        if ask.stated.is_none() {
            node.mode = Some(metadata.mode() & PERMISSIONS);
            (node.uid, node.gid) = (Some(metadata.uid()), Some(metadata.gid()));
        }
        Some(node)
    };
    if metadata.is_dir() && ask.stated.is_none() {
        let mut entries = Vec::new();
        walk(&path, &mut entries).map_err(|error| match error {
            WalkError::TooMany => DeviceError::TooMany { max: MAX_NODES },
            WalkError::Io(path, source) => failed(&path, source),
        })?;
        let devices = entries.iter().filter_map(|(entry, metadata)| {
            let below = entry.strip_prefix(&path).ok()?;
            of_node(entry, &ask.container_path.join(below), metadata)
        });
        found.extend(devices);
        return Ok(());
    }
    let node = of_node(&path, &ask.container_path, &metadata);
    let mut node = node.ok_or_else(|| DeviceError::NotADevice {
        field: ask.field.clone(),
        path: path.clone(),
    })?;
    if let Some(stated) = ask.stated {
        match stated.kind {
            Some(stated) if stated != node.kind && node.kind != Kind::Guests => {
                return Err(DeviceError::OtherKind {
                    field: ask.field.clone(),
                    path,
                    is: node.kind,
                    stated,
                });
            }
            _ => {}
        }
        (node.major, node.minor) = stated.number.unwrap_or((node.major, node.minor));
    }
    found.push(node);
    Ok(())
}

/// None for what is neither a block nor a character device.
fn kind_of(metadata: &Metadata) -> Option<(Kind, (u32, u32))> {
    let kind = metadata.file_type();
    let kind = match (kind.is_block_device(), kind.is_char_device()) {
        (true, _) => Kind::Block,
        (_, true) => Kind::Character,
        _ => return None,
    };
    // The kernel has 12 and 20 bits for them.
    let number = |part: u64| u32::try_from(part).unwrap_or(u32::MAX);
    let device = metadata.rdev();
    Some((kind, (number(major(device)), number(minor(device)))))
}

enum WalkError {
    TooMany,
    Io(PathBuf, io::Error),
}

/// What is below `dir` but directories, in the order of names, without
/// following links.
fn walk(dir: &Path, entries: &mut Vec<(PathBuf, Metadata)>) -> Result<(), WalkError> {
    let mut dirs = vec![dir.to_owned()];
    let mut seen = 0;
    while let Some(dir) = dirs.pop() {
        let failed = |source| WalkError::Io(dir.clone(), source);
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            seen += 1;
            if seen > MAX_ENTRIES || entries.len() > MAX_NODES {
                return Err(WalkError::TooMany);
            }
            if LEFT_OUT.iter().any(|left| entry.file_name() == *left) {
                continue;
            }
            // What vanishes meanwhile is not there.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() {
                dirs.push(entry.path());
            } else if kind_of(&metadata).is_some() {
                entries.push((entry.path(), metadata));
            }
        }
    }
    entries.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn ask(host: impl Into<PathBuf>, container: &str) -> Ask {
        Ask {
            field: format!("config.devices[{container}]"),
            host_path: host.into(),
            container_path: container.into(),
            access: Access::ALL,
            stated: None,
        }
    }

    fn none(_: &Path) -> bool {
        false
    }

    #[test]
    fn a_device_is_found_behind_a_link_with_what_it_is_on_the_node() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink("/dev/full", &link).unwrap();
        let found = find(&[ask(&link, "/dev/mine")], none).unwrap();
        let node = &found[0];
        assert_eq!(node.host_path, Path::new("/dev/full"));
        assert_eq!(node.container_path, Path::new("/dev/mine"));
        assert_eq!((node.kind, node.major, node.minor), (Kind::Character, 1, 7));
        let on_node = fs::metadata("/dev/full").unwrap();
        assert_eq!(node.mode, Some(on_node.mode() & PERMISSIONS));
        assert_eq!(node.uid, Some(on_node.uid()));
    }

    #[test]
    fn a_directory_stands_for_the_devices_below_it() {
        let found = find(&[ask("/dev", "/host")], none).unwrap();
        let paths: Vec<&Path> = found.iter().map(|n| n.container_path.as_path()).collect();
        assert!(paths.contains(&Path::new("/host/null")), "{paths:?}");
        assert!(paths.is_sorted());
        for left in ["/host/console", "/host/fd", "/host/stdin", "/host/pts"] {
            assert!(paths.iter().all(|path| !path.starts_with(left)), "{left}");
        }
    }

    #[test]
    fn what_is_no_device_is_refused_by_its_field() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let refused = |path: &Path| find(&[ask(path, "/dev/x")], none).unwrap_err();
        let error = refused(&file);
        assert!(matches!(error, DeviceError::NotADevice { .. }), "{error}");
        assert!(error.to_string().starts_with("config.devices[/dev/x]"));
        let error = refused(Path::new("/no/such"));
        assert!(matches!(error, DeviceError::Path { .. }), "{error}");
        assert_eq!(error.kind(), crate::ErrorKind::InvalidArgument);
    }

    #[test]
    fn the_last_to_name_a_path_has_it() {
        let found = find(
            &[ask("/dev/zero", "/dev/x"), ask("/dev/full", "/dev/x")],
            none,
        )
        .unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].minor, 7);
    }

    #[test]
    fn a_device_of_the_guest_need_not_be_on_the_node() {
        let guests = |path: &Path| path == Path::new("/dev/not-here");
        let found = find(&[ask("/dev/not-here", "/dev/x")], guests).unwrap();
        assert_eq!(found[0].kind, Kind::Guests);
    }

    #[test]
    fn what_a_cdi_file_states_is_not_looked_up() {
        let stated = Stated {
            kind: Some(Kind::Character),
            number: Some((1, 3)),
            mode: Some(0o600),
            ..Stated::default()
        };
        let with = |stated, path: &str| Ask {
            stated: Some(stated),
            ..ask(path, "/dev/x")
        };
        let found = find(&[with(stated, "/no/such")], none).unwrap();
        assert_eq!((found[0].major, found[0].minor), (1, 3));
        assert_eq!((found[0].mode, found[0].uid), (Some(0o600), None));
        let wrong = Stated {
            kind: Some(Kind::Block),
            ..Stated::default()
        };
        let error = find(&[with(wrong, "/dev/null")], none).unwrap_err();
        assert!(matches!(error, DeviceError::OtherKind { .. }), "{error}");
    }
}
