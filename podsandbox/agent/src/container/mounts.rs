//! The mounts of an OCI spec (runtime spec 1.2, "Mounts") as steps that the
//! child carries out after it has entered its root.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, fstat};
use oci_spec::runtime::Mount;

use super::plan::{MountKind, MountStep};
use crate::sys::{self, MountAttr};

/// A pod has tens of volumes; the kernel's own limit is 100000 in a namespace.
const MAX_MOUNTS: usize = 1024;

/// Files of /proc that a volume may take the place of, as the field's runtimes
/// have it: they tell of the machine, and a container is told of its share of
/// it (lxcfs). Nothing of them is about processes or grants a right.
const PROC_FILES: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// The files the agent writes for the pod, one for each name in [`ETC_FILES`].
pub const ETC_DIR: &str = "/run/drupe/etc";
pub const ETC_FILES: [&str; 3] = ["hosts", "resolv.conf", "hostname"];

/// The tmpfs that all containers of the pod have at /dev/shm.
pub const SHM: &CStr = c"/run/drupe/shm";

#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("a container of {count} mounts, more than {MAX_MOUNTS}")]
    TooMany { count: usize },
    #[error("mount destination {path:?} {why}")]
    Destination { path: PathBuf, why: &'static str },
    #[error("mount option {option:?} at {path:?} is not supported")]
    Option { path: PathBuf, option: String },
    #[error("mount of type {kind:?} at {path:?} is not supported")]
    Type { path: PathBuf, kind: String },
    #[error("mount source {source_path:?} of {path:?} is not below the pod's shared directory")]
    Source { path: PathBuf, source_path: PathBuf },
    #[error("mount source {source_path:?} of {path:?} is no image volume, or another mount's")]
    Image { path: PathBuf, source_path: PathBuf },
    #[error("cannot bind {source_path:?} for {path:?}")]
    Bind {
        path: PathBuf,
        source_path: PathBuf,
        source: io::Error,
    },
    #[error("cannot look at the container's root")]
    Root(#[source] Errno),
}

/// Mount options taken apart.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    flags: MsFlagsBits,
    clear: u64,
    propagation: u64,
    recursive_bind: bool,
    recursive_readonly: bool,
    data: String,
}

/// `MOUNT_ATTR_*` bits to set.
type MsFlagsBits = u64;

fn parse_options(path: &Path, options: &[String]) -> Result<Options, MountError> {
    let mut parsed = Options::default();
    let mut data = Vec::new();
    for option in options {
        let (set, clear) = match option.as_str() {
            "defaults" | "rw" | "async" | "bind" | "relatime" | "nolazytime" => (0, 0),
            "ro" => (libc::MOUNT_ATTR_RDONLY, 0),
            "rro" => {
                parsed.recursive_readonly = true;
                (libc::MOUNT_ATTR_RDONLY, 0)
            }
            "nosuid" => (libc::MOUNT_ATTR_NOSUID, 0),
            "suid" => (0, libc::MOUNT_ATTR_NOSUID),
            "nodev" => (libc::MOUNT_ATTR_NODEV, 0),
            "dev" => (0, libc::MOUNT_ATTR_NODEV),
            "noexec" => (libc::MOUNT_ATTR_NOEXEC, 0),
            "exec" => (0, libc::MOUNT_ATTR_NOEXEC),
            "noatime" => (libc::MOUNT_ATTR_NOATIME, 0),
            "strictatime" => (libc::MOUNT_ATTR_STRICTATIME, 0),
            "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, 0),
            "nosymfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
            "rbind" => {
                parsed.recursive_bind = true;
                (0, 0)
            }
            "private" | "rprivate" => {
                parsed.propagation = libc::MS_PRIVATE;
                (0, 0)
            }
            "slave" | "rslave" => {
                parsed.propagation = libc::MS_SLAVE;
                (0, 0)
            }
            "shared" | "rshared" => {
                parsed.propagation = libc::MS_SHARED;
                (0, 0)
            }
            "idmap" | "ridmap" | "tmpcopyup" | "remount" | "mand" | "sync" => {
                return Err(MountError::Option {
                    path: path.into(),
                    option: option.clone(),
                });
            }
            other => {
                data.push(other);
                (0, 0)
            }
        };
        parsed.flags = parsed.flags & !clear | set;
        parsed.clear = parsed.clear & !set | clear;
    }
    if parsed.flags & libc::MOUNT_ATTR__ATIME != 0 {
        // A new atime mode is only taken when the whole field is cleared.
        parsed.clear |= libc::MOUNT_ATTR__ATIME;
    }
    parsed.data = data.join(",");
    Ok(parsed)
}

/// A destination without `.` and `..`, so that its order and its place below
/// /proc can be judged by its text.
fn destination(mount: &Mount) -> Result<PathBuf, MountError> {
    let path = mount.destination();
    let refuse = |why| MountError::Destination {
        path: path.clone(),
        why,
    };
    if !path.is_absolute() {
        return Err(refuse("is not absolute"));
    }
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir => {
                clean.pop();
            }
            Component::Normal(name) => clean.push(name),
            Component::Prefix(_) => return Err(refuse("has a prefix")),
        }
    }
    if clean == Path::new("/") {
        return Err(refuse("is the root"));
    }
    let below_proc = clean.starts_with("/proc") && clean != Path::new("/proc");
    let replaceable = PROC_FILES.iter().any(|file| clean == Path::new(file));
    if below_proc && !(replaceable && is_bind(mount)) {
        return Err(refuse(
            "lies below /proc and is no bind of one of the files that may be replaced there",
        ));
    }
    if clean.as_os_str().len() >= libc::PATH_MAX as usize {
        return Err(refuse("is too long"));
    }
    Ok(clean)
}

fn c_path(path: &Path) -> Result<CString, MountError> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| MountError::Destination {
        path: path.into(),
        why: "contains a null byte",
    })
}

fn c_text(path: &Path, option: &str) -> Result<CString, MountError> {
    CString::new(option).map_err(|_| MountError::Option {
        path: path.into(),
        option: option.to_owned(),
    })
}

/// What the spec's mounts come to.
#[derive(Debug)]
pub struct Mounts {
    pub steps: Vec<MountStep>,
    /// /dev is the container's own tmpfs (or the image's directory), in which
    /// device nodes are to be made; a volume there brings its own.
    pub make_devices: bool,
}

/// Prepares the spec's mounts, in its order, and adds the pod's /dev/shm and,
/// with `etc_files`, its /etc/hosts, /etc/resolv.conf and /etc/hostname where
/// the spec names no mount of its own there. A mount of type "image" takes the
/// one of `images` whose number is its source.
pub fn prepare(
    mounts: &[Mount],
    shared_dir: &Path,
    etc_files: bool,
    images: Vec<OwnedFd>,
) -> Result<Mounts, MountError> {
    if mounts.len() > MAX_MOUNTS {
        return Err(MountError::TooMany {
            count: mounts.len(),
        });
    }
    let mut steps = Vec::with_capacity(mounts.len() + 4);
    let mut make_devices = true;
    let mut named = Vec::with_capacity(mounts.len());
    let mut images: Vec<Option<OwnedFd>> = images.into_iter().map(Some).collect();
    for mount in mounts {
        let path = destination(mount)?;
        let options = parse_options(&path, mount.options().as_deref().unwrap_or_default())?;
        let is_bind = is_bind(mount);
        if path == Path::new("/dev/shm") && !is_bind {
            continue;
        }
        make_devices &= !(is_bind && path == Path::new("/dev"));
        steps.push(if mount.typ().as_deref() == Some("image") {
            image(mount, &path, &mut images)?
        } else if is_bind {
            bind(mount, &path, options, shared_dir)?
        } else {
            new_mount(mount, &path, options)?
        });
        named.push(path);
    }
    let has = |path: &str| named.iter().any(|named| named == Path::new(path));
    if make_devices && has("/dev") && !has("/dev/shm") {
        steps.push(pod_tree(SHM, "/dev/shm", true)?);
    }
    if etc_files {
        for name in ETC_FILES {
            let target = format!("/etc/{name}");
            if !has(&target) && !has("/etc") {
                let source = c_path(&Path::new(ETC_DIR).join(name))?;
                steps.push(pod_tree(&source, &target, false)?);
            }
        }
    }
    Ok(Mounts {
        steps,
        make_devices,
    })
}

/// Whether what the container mounts below it is for others to see.
pub fn propagates(mount: &Mount) -> bool {
    let mut options = mount.options().iter().flatten();
    is_bind(mount) && options.any(|option| option == "shared" || option == "rshared")
}

pub fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount
            .options()
            .iter()
            .flatten()
            .any(|option| option == "bind" || option == "rbind")
}

/// An image volume, which was mounted read-only with the container's root.
fn image(
    mount: &Mount,
    path: &Path,
    images: &mut [Option<OwnedFd>],
) -> Result<MountStep, MountError> {
    let source = mount.source().clone().unwrap_or_default();
    let number = source.to_str().and_then(|text| text.parse::<usize>().ok());
    let tree = number.and_then(|number| images.get_mut(number)?.take());
    let tree = tree.ok_or_else(|| MountError::Image {
        path: path.into(),
        source_path: source.clone(),
    })?;
    Ok(MountStep {
        target: c_path(path)?,
        kind: MountKind::Tree(tree),
        directory: true,
    })
}

/// A bind of something of the agent's own.
fn pod_tree(source: &CStr, target: &str, directory: bool) -> Result<MountStep, MountError> {
    let path = Path::new(target);
    let tree = sys::clone_mount(AT_FDCWD, source, false).map_err(|errno| MountError::Bind {
        path: path.into(),
        source_path: source.to_string_lossy().into_owned().into(),
        source: errno.into(),
    })?;
    Ok(MountStep {
        target: c_path(path)?,
        kind: MountKind::Tree(tree),
        directory,
    })
}

/// Clones the mount of a volume. Its path was made by the daemon, but what is
/// in it may be the container's doing, so no symbolic link is followed.
fn bind(
    mount: &Mount,
    path: &Path,
    options: Options,
    shared_dir: &Path,
) -> Result<MountStep, MountError> {
    let source = mount.source().clone().unwrap_or_default();
    let outside = || MountError::Source {
        path: path.into(),
        source_path: source.clone(),
    };
    let bounded = [shared_dir, Path::new("/dev")]
        .into_iter()
        .find(|dir| source.starts_with(dir));
    let base = bounded.ok_or_else(outside)?;
    let failed = |errno: Errno| MountError::Bind {
        path: path.into(),
        source_path: source.clone(),
        source: errno.into(),
    };
    let below = source.strip_prefix(base).map_err(|_| outside())?;
    let base = open(
        base,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed)?;
    let tree = match below.file_name() {
        None => sys::clone_mount(base.as_fd(), c"", options.recursive_bind).map_err(failed)?,
        Some(name) => {
            let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            let parent: OwnedFd = match below.parent().filter(|p| !p.as_os_str().is_empty()) {
                None => base,
                Some(parent) => {
                    sys::openat2(base.as_fd(), &c_path(parent)?, flags, resolve).map_err(failed)?
                }
            };
            sys::clone_mount(
                parent.as_fd(),
                &c_path(Path::new(name))?,
                options.recursive_bind,
            )
            .map_err(failed)?
        }
    };
    // The copy of a volume is a peer of the volume, and so is all below it.
    let propagation = MountAttr {
        propagation: options.propagation,
        ..MountAttr::default()
    };
    let attr = MountAttr {
        set: options.flags,
        clear: options.clear,
        propagation: 0,
    };
    for (attr, recursive) in [(propagation, true), (attr, options.recursive_readonly)] {
        if !attr.is_empty() {
            sys::mount_setattr(tree.as_raw_fd(), c"", recursive, attr).map_err(failed)?;
        }
    }
    let directory = fstat(&tree).map_err(failed)?.st_mode & libc::S_IFMT == libc::S_IFDIR;
    Ok(MountStep {
        target: c_path(path)?,
        kind: MountKind::Tree(tree),
        directory,
    })
}

fn new_mount(mount: &Mount, path: &Path, options: Options) -> Result<MountStep, MountError> {
    let kind = mount.typ().as_deref().unwrap_or_default();
    let fs = match kind {
        // The guest only has the unified hierarchy.
        "cgroup" | "cgroup2" => c"cgroup2".to_owned(),
        "proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue" | "bpf" | "debugfs" | "tracefs"
        | "securityfs" => c_text(path, kind)?,
        _ => {
            return Err(MountError::Type {
                path: path.into(),
                kind: kind.to_owned(),
            });
        }
    };
    let source = mount
        .source()
        .clone()
        .unwrap_or_else(|| PathBuf::from(kind));
    let data = if matches!(kind, "cgroup" | "cgroup2") {
        ""
    } else {
        options.data.as_str()
    };
    let attr = MountAttr {
        set: 0,
        clear: 0,
        propagation: options.propagation,
    };
    Ok(MountStep {
        target: c_path(path)?,
        kind: MountKind::New {
            fs,
            source: c_path(&source)?,
            flags: mount_flags(options.flags),
            data: c_text(path, data)?,
            attr,
        },
        directory: true,
    })
}

/// `MOUNT_ATTR_*` as `mount(2)` has them.
fn mount_flags(attributes: u64) -> MsFlags {
    let pairs = [
        (libc::MOUNT_ATTR_RDONLY, MsFlags::MS_RDONLY),
        (libc::MOUNT_ATTR_NOSUID, MsFlags::MS_NOSUID),
        (libc::MOUNT_ATTR_NODEV, MsFlags::MS_NODEV),
        (libc::MOUNT_ATTR_NOEXEC, MsFlags::MS_NOEXEC),
        (libc::MOUNT_ATTR_NOATIME, MsFlags::MS_NOATIME),
        (libc::MOUNT_ATTR_STRICTATIME, MsFlags::MS_STRICTATIME),
        (libc::MOUNT_ATTR_NODIRATIME, MsFlags::MS_NODIRATIME),
    ];
    pairs
        .into_iter()
        .filter(|(attribute, _)| attributes & attribute != 0)
        .fold(MsFlags::empty(), |flags, (_, flag)| flags | flag)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::MountBuilder;

    use super::*;

    fn mount(target: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
        MountBuilder::default()
            .destination(target)
            .typ(kind)
            .source(source)
            .options(options.iter().map(|&o| o.to_owned()).collect::<Vec<_>>())
            .build()
            .unwrap()
    }

    #[test]
    fn options_become_flags_and_data() {
        let options = ["nosuid", "strictatime", "mode=755", "size=65536k"].map(str::to_owned);
        let parsed = parse_options(Path::new("/dev"), &options).unwrap();
        assert_eq!(parsed.data, "mode=755,size=65536k");
        assert_eq!(
            mount_flags(parsed.flags),
            MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME
        );
        assert_eq!(parsed.clear, libc::MOUNT_ATTR__ATIME);
    }

    #[test]
    fn the_last_of_opposite_options_wins() {
        let options = ["nosuid", "suid", "dev", "nodev"].map(str::to_owned);
        let parsed = parse_options(Path::new("/x"), &options).unwrap();
        assert_eq!(parsed.flags, libc::MOUNT_ATTR_NODEV);
        assert_eq!(parsed.clear, libc::MOUNT_ATTR_NOSUID);
    }

    #[test]
    fn destinations_are_cleaned_and_judged() {
        let clean = |path: &str| destination(&mount(path, "tmpfs", "", &[]));
        assert_eq!(clean("/a/../b/./c").unwrap(), Path::new("/b/c"));
        assert_eq!(clean("/proc").unwrap(), Path::new("/proc"));
        for bad in ["a", "/", "/..", "/proc/self/fd", "/x/../proc/sys"] {
            assert!(
                matches!(clean(bad), Err(MountError::Destination { .. })),
                "{bad}"
            );
        }
        // As lxcfs has it mounted, but no other file system and no other file.
        let bind = |path: &str| destination(&mount(path, "bind", "/s", &["rbind"]));
        assert!(bind("/proc/meminfo").is_ok() && bind("/proc/x/../uptime").is_ok());
        assert!(clean("/proc/meminfo").is_err());
        assert!(bind("/proc/sysrq-trigger").is_err() && bind("/proc/cpuinfo/x").is_err());
    }

    #[test]
    fn a_source_outside_the_shared_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for source in ["/etc", "/run/drupe", "relative"] {
            let error = prepare(
                &[mount("/x", "bind", source, &["rbind"])],
                dir.path(),
                false,
                Vec::new(),
            )
            .unwrap_err();
            assert!(
                matches!(error, MountError::Source { .. }),
                "{source}: {error}"
            );
        }
    }

    #[test]
    fn links_in_the_shared_directory_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
        for source in ["link/passwd", "sub/../../etc"] {
            let source = dir.path().join(source);
            let source = source.to_str().unwrap();
            let mounts = [mount("/x", "bind", source, &[])];
            let error = prepare(&mounts, dir.path(), false, Vec::new()).unwrap_err();
            assert!(
                matches!(error, MountError::Bind { .. }),
                "{source}: {error}"
            );
        }
    }

    #[test]
    fn an_image_volume_is_one_mounts_alone() {
        let dir = tempfile::tempdir().unwrap();
        let prepare = |sources: &[&str]| {
            let tree = std::fs::File::open(dir.path()).unwrap().into();
            let mounts: Vec<Mount> = sources
                .iter()
                .map(|source| mount("/x", "image", source, &["ro"]))
                .collect();
            prepare(&mounts, dir.path(), false, vec![tree])
        };
        let taken = prepare(&["0"]).unwrap();
        assert!(matches!(taken.steps[0].kind, MountKind::Tree(_)));
        for sources in [&["1"][..], &["-1"], &["/etc"], &["0", "0"]] {
            let error = prepare(sources).unwrap_err();
            assert!(
                matches!(error, MountError::Image { .. }),
                "{sources:?}: {error}"
            );
        }
    }

    #[test]
    fn unknown_types_and_options_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |mount| prepare(&[mount], dir.path(), false, Vec::new()).unwrap_err();
        let error = refused(mount("/x", "nfs", "a:/b", &[]));
        assert_eq!(
            error.to_string(),
            "mount of type \"nfs\" at \"/x\" is not supported"
        );
        let error = refused(mount("/x", "tmpfs", "t", &["idmap"]));
        assert_eq!(
            error.to_string(),
            "mount option \"idmap\" at \"/x\" is not supported"
        );
    }
}
