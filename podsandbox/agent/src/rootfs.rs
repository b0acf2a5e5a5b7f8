//! A container's root: EROFS layers from partitions of its image disk under an
//! overlay whose upper directory is on the scratch disk; and image volumes,
//! which are the same without anything to write to.
//!
//! In a user namespace the layers are shown with their owners mapped. Overlays
//! cannot be; what containers write has the guest's ids on the scratch disk.
//!
//! Nothing is mounted at a path: each layer and the overlay are detached mounts
//! (fsmount(2)), so there is nothing to unmount. The overlay lives as long as
//! the container's mount namespace, the layers as long as the overlay.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use agent_api::{BlockDisk, ImageVolume, Layer, RootDisk, image_serial};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::chown;

use crate::disk::{Disk, DiskError, Partitions, Range};
use crate::raw_disk::RawDisk;
use crate::sys;
use crate::tree;
use crate::userns::UserNamespace;

/// The scratch disk.
pub const SCRATCH: &str = "/run/drupe/scratch";

/// `OVL_MAX_STACK` is 500; an image has at most 127 layers.
const MAX_LAYERS: usize = 200;

/// A guest has at most 32 disks for images.
const MAX_VOLUMES: usize = 32;

/// How an image volume is mounted: its files are data, or programs to be run
/// as whoever runs them.
const VOLUME: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    #[error("the container's root names {count} layers, more than {MAX_LAYERS}")]
    TooManyLayers { count: usize },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("cannot make {path}")]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot mount layer {device}: {detail}")]
    Layer {
        device: String,
        detail: String,
        source: io::Error,
    },
    #[error("cannot mount the container's overlay: {detail}")]
    Overlay { detail: String, source: io::Error },
    #[error("the container has {count} image volumes, more than {MAX_VOLUMES}")]
    TooManyVolumes { count: usize },
    #[error("cannot show the owners of files of a layer as the pod's user namespace maps them")]
    Idmap(#[source] io::Error),
    /// In the words that the kubelet looks for.
    #[error("ImageVolumeMountFailed: {mounted_at}: image_sub_path {sub_path:?}")]
    SubPath {
        mounted_at: String,
        sub_path: String,
        source: io::Error,
    },
}

/// What is left to undo once a container has gone.
#[derive(Debug)]
pub struct Rootfs {
    partitions: Vec<Partitions>,
    /// Disks that it has as device files.
    raw: Vec<RawDisk>,
    dir: PathBuf,
}

/// Mounts that are attached nowhere; each descriptor is the only holder.
#[derive(Debug)]
pub struct Trees {
    pub root: OwnedFd,
    /// Read-only, in the order of the request.
    pub images: Vec<OwnedFd>,
}

impl Rootfs {
    /// Mounts the root of container `id` and its image volumes.
    pub async fn mount(
        id: &str,
        disk: Option<&RootDisk>,
        volumes: &[ImageVolume],
        user: Option<&UserNamespace>,
    ) -> Result<(Self, Trees), RootfsError> {
        let dir = Path::new(SCRATCH).join("containers").join(id);
        let mut rootfs = Self {
            partitions: Vec::new(),
            raw: Vec::new(),
            dir,
        };
        match rootfs.try_mount(disk, volumes, user).await {
            Ok(trees) => Ok((rootfs, trees)),
            Err(error) => {
                if let Err(undo) = rootfs.remove().await {
                    eprintln!("drupe-agent: container {id}: {undo}");
                }
                Err(error)
            }
        }
    }

    async fn try_mount(
        &mut self,
        disk: Option<&RootDisk>,
        volumes: &[ImageVolume],
        user: Option<&UserNamespace>,
    ) -> Result<Trees, RootfsError> {
        if volumes.len() > MAX_VOLUMES {
            let count = volumes.len();
            return Err(RootfsError::TooManyVolumes { count });
        }
        for name in ["upper", "work", "empty"] {
            let path = self.dir.join(name);
            fs::create_dir_all(&path).map_err(|source| RootfsError::Directory { path, source })?;
        }
        if let Some(user) = user {
            // It lends its owner to the container's root directory.
            let (path, root) = (self.upper(), user.ids().root());
            chown(&path, Some(root.into()), Some(root.into())).map_err(|errno| {
                RootfsError::Directory {
                    path,
                    source: errno.into(),
                }
            })?;
        }
        let layers = self.mount_layers(disk, user).await?;
        let root = self.mount_overlay(layers, true)?;
        let mut images = Vec::with_capacity(volumes.len());
        for volume in volumes {
            let layers = self.mount_layers(volume.disk.as_ref(), user).await?;
            let tree = self.mount_overlay(layers, false)?;
            images.push(below(tree, volume)?);
        }
        Ok(Trees { root, images })
    }

    async fn mount_layers(
        &mut self,
        disk: Option<&RootDisk>,
        user: Option<&UserNamespace>,
    ) -> Result<Vec<OwnedFd>, RootfsError> {
        let range = |layer: &Layer| Range {
            offset: layer.offset,
            length: layer.length,
        };
        let layers = disk.iter().flat_map(|disk| &disk.layers);
        let ranges: Vec<Range> = layers.map(range).collect();
        if ranges.len() > MAX_LAYERS {
            return Err(RootfsError::TooManyLayers {
                count: ranges.len(),
            });
        }
        let mut layers = Vec::with_capacity(ranges.len());
        let Some(disk) = disk.filter(|_| !ranges.is_empty()) else {
            return Ok(layers);
        };
        let disk = Disk::find(&image_serial(disk.slot))?;
        let partitions = Partitions::create(disk, &ranges).await?;
        let devices: Vec<CString> = partitions.devices().collect();
        self.partitions.push(partitions);
        for device in devices {
            let layer = mount_layer(&device)?;
            if let Some(user) = user {
                sys::idmap_mount(layer.as_fd(), user.as_fd())
                    .map_err(|errno| RootfsError::Idmap(errno.into()))?;
            }
            layers.push(layer);
        }
        Ok(layers)
    }

    fn mount_overlay(&self, layers: Vec<OwnedFd>, writable: bool) -> Result<OwnedFd, RootfsError> {
        let failed = |fs: Option<&OwnedFd>, errno: Errno| RootfsError::Overlay {
            detail: fs.map(kernel_words).unwrap_or_default(),
            source: errno.into(),
        };
        let directory = |name: &str| -> Result<OwnedFd, RootfsError> {
            let path = self.dir.join(name);
            open(
                &path,
                OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
                Mode::empty(),
            )
            .map_err(|errno| RootfsError::Directory {
                path,
                source: errno.into(),
            })
        };
        let mut lower = layers;
        if !writable && lower.is_empty() {
            return empty_mount().map_err(|errno| failed(None, errno));
        }
        if !writable || lower.is_empty() {
            // Without an upper layer the kernel takes no less than two.
            lower.insert(0, directory("empty")?);
        }
        let fs = sys::fsopen(c"overlay").map_err(|errno| failed(None, errno))?;
        let configure = || -> sys::Result<()> {
            // Highest first (overlayfs.rst, "Specifying lower layers").
            for layer in lower.iter().rev() {
                sys::fsconfig_fd(fs.as_fd(), c"lowerdir+", layer.as_fd())?;
            }
            Ok(())
        };
        configure().map_err(|errno| failed(Some(&fs), errno))?;
        if !writable {
            let finish = || -> sys::Result<OwnedFd> {
                sys::fsconfig_create(fs.as_fd())?;
                sys::fsmount(fs.as_fd(), VOLUME)
            };
            return finish().map_err(|errno| failed(Some(&fs), errno));
        }
        for (key, name) in [(c"upperdir", "upper"), (c"workdir", "work")] {
            sys::fsconfig_fd(fs.as_fd(), key, directory(name)?.as_fd())
                .map_err(|errno| failed(Some(&fs), errno))?;
        }
        let finish = || -> sys::Result<OwnedFd> {
            // The upper layer ends with the pod: syncing it to disk gains nothing.
            sys::fsconfig_flag(fs.as_fd(), c"volatile")?;
            sys::fsconfig_create(fs.as_fd())?;
            sys::fsmount(fs.as_fd(), 0)
        };
        finish().map_err(|errno| failed(Some(&fs), errno))
    }

    /// Takes a disk for the container to have as a device file; its numbers.
    pub async fn take_disk(&mut self, disk: &BlockDisk) -> Result<(u64, u64), RootfsError> {
        let raw = RawDisk::take(disk).await?;
        let number = (raw.major, raw.minor);
        self.raw.push(raw);
        Ok(number)
    }

    /// Where the container's own files are: its writable layer.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// Gives the disks back and deletes the writable layer, the latter in
    /// the background: it may hold a million files. Every mount of the root
    /// must have gone.
    pub async fn remove(&mut self) -> Result<(), RootfsError> {
        while let Some(raw) = self.raw.last() {
            raw.release().await?;
            self.raw.pop();
        }
        while let Some(partitions) = self.partitions.last_mut() {
            partitions.remove().await?;
            self.partitions.pop();
        }
        match tree::discard(&self.dir) {
            Ok(()) => Ok(()),
            Err(source) => Err(RootfsError::Directory {
                path: self.dir.clone(),
                source,
            }),
        }
    }
}

/// The volume of an image without layers.
fn empty_mount() -> sys::Result<OwnedFd> {
    let fs = sys::fsopen(c"tmpfs")?;
    sys::fsconfig_string(fs.as_fd(), c"mode", c"755")?;
    sys::fsconfig_flag(fs.as_fd(), c"ro")?;
    sys::fsconfig_create(fs.as_fd())?;
    sys::fsmount(fs.as_fd(), VOLUME)
}

/// The directory of an image volume that the container is to see.
fn below(tree: OwnedFd, volume: &ImageVolume) -> Result<OwnedFd, RootfsError> {
    if volume.sub_path.is_empty() {
        return Ok(tree);
    }
    let failed = |errno: Errno| RootfsError::SubPath {
        mounted_at: volume.container_path.clone(),
        sub_path: volume.sub_path.clone(),
        source: errno.into(),
    };
    let path = CString::new(volume.sub_path.as_str()).map_err(|_| failed(Errno::EINVAL))?;
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let dir = sys::openat2(tree.as_fd(), &path, flags, libc::RESOLVE_IN_ROOT).map_err(failed)?;
    sys::clone_mount(dir.as_fd(), c"", false).map_err(failed)
}

fn mount_layer(device: &CString) -> Result<OwnedFd, RootfsError> {
    let failed = |fs: Option<&OwnedFd>, errno: Errno| RootfsError::Layer {
        device: device.to_string_lossy().into_owned(),
        detail: fs.map(kernel_words).unwrap_or_default(),
        source: errno.into(),
    };
    let fs = sys::fsopen(c"erofs").map_err(|errno| failed(None, errno))?;
    let mount = || -> sys::Result<OwnedFd> {
        sys::fsconfig_string(fs.as_fd(), c"source", device)?;
        sys::fsconfig_flag(fs.as_fd(), c"ro")?;
        sys::fsconfig_create(fs.as_fd())?;
        sys::fsmount(fs.as_fd(), libc::MOUNT_ATTR_RDONLY)
    };
    mount().map_err(|errno| failed(Some(&fs), errno))
}

/// What the kernel has to say about a mount that failed: messages read from
/// the file system context, "e " before each error.
fn kernel_words(fs: &OwnedFd) -> String {
    const MAX_MESSAGES: usize = 4;
    let mut words = Vec::new();
    let mut buffer = [0; 512];
    for _ in 0..MAX_MESSAGES {
        match nix::unistd::read(fs, &mut buffer) {
            Ok(length) if length > 0 => {
                let line = String::from_utf8_lossy(&buffer[..length]);
                words.push(line.trim().trim_start_matches("e ").to_owned());
            }
            _ => break,
        }
    }
    words.join("; ")
}
