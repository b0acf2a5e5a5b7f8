//! A container's root: EROFS layers from partitions of its image disk under an
//! overlay whose upper directory is on the scratch disk.
//!
//! Nothing is mounted at a path: each layer and the overlay are detached mounts
//! (fsmount(2)), so there is nothing to unmount. The overlay lives as long as
//! the container's mount namespace, the layers as long as the overlay.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use agent_api::{RootDisk, image_serial};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::disk::{Disk, DiskError, Partitions, Range};
use crate::sys;
use crate::tree;

/// The scratch disk.
pub const SCRATCH: &str = "/run/drupe/scratch";

/// `OVL_MAX_STACK` is 500; an image has at most 127 layers.
const MAX_LAYERS: usize = 200;

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
}

/// What is left to undo once a container has gone.
#[derive(Debug)]
pub struct Rootfs {
    partitions: Option<Partitions>,
    dir: PathBuf,
}

impl Rootfs {
    /// Mounts the root of container `id`; the descriptor is its only holder.
    pub async fn mount(id: &str, disk: Option<&RootDisk>) -> Result<(Self, OwnedFd), RootfsError> {
        let dir = Path::new(SCRATCH).join("containers").join(id);
        let mut rootfs = Self {
            partitions: None,
            dir,
        };
        match rootfs.try_mount(disk).await {
            Ok(tree) => Ok((rootfs, tree)),
            Err(error) => {
                if let Err(undo) = rootfs.remove().await {
                    eprintln!("drupe-agent: container {id}: {undo}");
                }
                Err(error)
            }
        }
    }

    async fn try_mount(&mut self, disk: Option<&RootDisk>) -> Result<OwnedFd, RootfsError> {
        for name in ["upper", "work", "empty"] {
            let path = self.dir.join(name);
            fs::create_dir_all(&path).map_err(|source| RootfsError::Directory { path, source })?;
        }
        let ranges: Vec<Range> = disk
            .iter()
            .flat_map(|disk| &disk.layers)
            .map(|layer| Range {
                offset: layer.offset,
                length: layer.length,
            })
            .collect();
        if ranges.len() > MAX_LAYERS {
            return Err(RootfsError::TooManyLayers {
                count: ranges.len(),
            });
        }
        let mut layers = Vec::with_capacity(ranges.len());
        if let Some(disk) = disk.filter(|_| !ranges.is_empty()) {
            let disk = Disk::find(&image_serial(disk.slot))?;
            let partitions = self
                .partitions
                .insert(Partitions::create(disk, &ranges).await?);
            for device in partitions.devices() {
                layers.push(mount_layer(&device)?);
            }
        }
        self.mount_overlay(layers)
    }

    fn mount_overlay(&self, layers: Vec<OwnedFd>) -> Result<OwnedFd, RootfsError> {
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
        let lower = if layers.is_empty() {
            vec![directory("empty")?]
        } else {
            layers
        };
        let fs = sys::fsopen(c"overlay").map_err(|errno| failed(None, errno))?;
        let configure = || -> sys::Result<()> {
            // Highest first (overlayfs.rst, "Specifying lower layers").
            for layer in lower.iter().rev() {
                sys::fsconfig_fd(fs.as_fd(), c"lowerdir+", layer.as_fd())?;
            }
            Ok(())
        };
        configure().map_err(|errno| failed(Some(&fs), errno))?;
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

    /// Where the container's own files are: its writable layer.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// Gives the image disk back and deletes the writable layer, the latter in
    /// the background: it may hold a million files. Every mount of the root
    /// must have gone.
    pub async fn remove(&mut self) -> Result<(), RootfsError> {
        if let Some(partitions) = &mut self.partitions {
            partitions.remove().await?;
        }
        self.partitions = None;
        match tree::discard(&self.dir) {
            Ok(()) => Ok(()),
            Err(source) => Err(RootfsError::Directory {
                path: self.dir.clone(),
                source,
            }),
        }
    }
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
