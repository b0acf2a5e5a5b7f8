//! A container's root on the host: its image's layers, each mounted as the
//! EROFS file system that it is, under one overlay. Its image volumes likewise.
//!
//! An overlay keeps its layers' file systems by itself, so their own mounts
//! are undone at once: what stays is one mount an image, and freeing that
//! frees all, loop devices included. Everything lies below the pod's
//! directories and is found by that.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use agent_api::UPPER_LINK;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::volumes::unmount_below;
use crate::{Error, Result, trash};

/// In the bundle.
const ROOT: &str = "rootfs";
const LAYERS: &str = "layers";
const VOLUMES: &str = "images";
/// In the writable directory.
const UPPER: &str = "upper";
const WORK: &str = "work";
const NONE: Option<&str> = None;

/// Where a container's root is made.
#[derive(Clone, Debug)]
pub struct Place {
    /// Volatile: the OCI runtime's bundle.
    pub bundle: PathBuf,
    /// On disk: what the container writes.
    pub writable: PathBuf,
    /// Where that goes, to be deleted by whoever empties it.
    pub trash: PathBuf,
}

impl Place {
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.bundle.join(ROOT)
    }

    /// Mounts `layers`, lowest first. On failure nothing stays.
    pub fn mount(&self, layers: &[PathBuf]) -> Result<()> {
        let mounted = self.try_mount(layers);
        if mounted.is_err()
            && let Err(left) = self.remove()
        {
            tracing::error!(bundle = ?self.bundle, error = %left.sentence(), "cannot undo a container's root");
        }
        mounted
    }

    fn try_mount(&self, layers: &[PathBuf]) -> Result<()> {
        let (root, link) = (self.root(), self.bundle.join(UPPER_LINK));
        let (upper, work) = (self.writable.join(UPPER), self.writable.join(WORK));
        // The upper directory is the root that the container sees.
        for (dir, mode) in [(&root, 0o755), (&upper, 0o755), (&work, 0o700)] {
            make_dir(dir, mode)?;
        }
        symlink(&upper, &link).map_err(|e| failed(&link, e))?;
        // An image without layers has an empty root; an overlay needs one.
        let stack = Stack::mount(&self.bundle, layers, usize::from(layers.is_empty()))?;
        let writable = File::open(&self.writable).map_err(|e| failed(&self.writable, e))?;
        let fd = by_fd(&writable);
        let options = format!(",upperdir={fd}/{UPPER},workdir={fd}/{WORK}");
        stack.become_overlay(&root, &options, MsFlags::empty())
    }

    /// Mounts an image volume, read-only, beside the root; where its directory
    /// `sub_path` is then. What a failure leaves is [`Place::remove`]'s.
    pub fn mount_volume(
        &self,
        number: usize,
        layers: &[PathBuf],
        container_path: &Path,
        sub_path: &str,
    ) -> Result<PathBuf> {
        let at = self.bundle.join(VOLUMES).join(number.to_string());
        make_dir(&at, 0o755)?;
        // An overlay without anything to write to has two layers at least.
        let empty = 2_usize.saturating_sub(layers.len());
        let stack = Stack::mount(&self.bundle, layers, empty)?;
        stack.become_overlay(&at, "", MsFlags::MS_RDONLY)?;
        if sub_path.is_empty() {
            return Ok(at);
        }
        below(&at, sub_path, container_path)
    }

    /// Unmounts and removes everything, however far [`Place::mount`] came. What
    /// the container has written, which may be much, is in the trash then.
    pub fn remove(&self) -> Result<()> {
        // Nothing may be removed through a mount.
        unmount_below(&self.bundle)?;
        remove_dir(&self.bundle)?;
        trash::discard(&self.trash, &self.writable)
    }
}

/// Layers, each mounted for as long as it takes to put an overlay together.
struct Stack {
    dir: PathBuf,
    /// Empty directories below the layers.
    empty: usize,
    layers: usize,
}

impl Stack {
    fn mount(bundle: &Path, layers: &[PathBuf], empty: usize) -> Result<Self> {
        let stack = Self {
            dir: bundle.join(LAYERS),
            empty,
            layers: layers.len(),
        };
        make_dir(&stack.dir, 0o700)?;
        for index in 0..empty + layers.len() {
            make_dir(&stack.at(index), 0o755)?;
        }
        for (index, layer) in layers.iter().enumerate() {
            mount_layer(layer, &stack.at(empty + index))?;
        }
        Ok(stack)
    }

    fn at(&self, index: usize) -> PathBuf {
        self.dir.join(index.to_string())
    }

    fn become_overlay(self, root: &Path, options: &str, flags: MsFlags) -> Result<()> {
        // By descriptors: the kernel takes a page of options, and paths may
        // have characters that mean something there.
        let dir = File::open(&self.dir).map_err(|e| failed(&self.dir, e))?;
        let stack: Vec<String> = (0..self.empty + self.layers)
            .rev()
            .map(|index| format!("{}/{index}", by_fd(&dir)))
            .collect();
        let options = format!("lowerdir={}{options}", stack.join(":"));
        let overlay = Some("overlay");
        mount(overlay, root, overlay, flags, Some(options.as_str()))
            .map_err(|errno| failed(root, errno.into()))?;
        drop(dir);
        for index in self.empty..self.empty + self.layers {
            let at = self.at(index);
            umount2(&at, MntFlags::MNT_DETACH).map_err(|errno| failed(&at, errno.into()))?;
        }
        fs::remove_dir_all(&self.dir).map_err(|e| failed(&self.dir, e))
    }
}

fn by_fd(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// The directory `path` of the image mounted at `image`, in which links lead to
/// nowhere outside of it. It is read-only: what is found stays.
fn below(image: &Path, path: &str, container_path: &Path) -> Result<PathBuf> {
    let bad = |errno: Errno| Error::ImageSubPath {
        container_path: container_path.display().to_string(),
        sub_path: path.to_owned(),
        source: errno.into(),
    };
    let root = File::open(image).map_err(|e| failed(image, e))?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let found = openat2(&root, path, how).map_err(bad)?;
    let link = format!("/proc/self/fd/{}", found.as_raw_fd());
    fs::read_link(&link).map_err(|e| failed(Path::new(&link), e))
}

/// One that is gone is no error.
fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(dir, error)),
        _ => Ok(()),
    }
}

fn make_dir(dir: &Path, mode: u32) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    let parent = dir.parent().unwrap_or(dir);
    builder.recursive(true).mode(0o700);
    builder.create(parent).map_err(|e| failed(parent, e))?;
    // The umask must not take from what the container sees.
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir(dir)
        .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(mode)))
        .map_err(|e| failed(dir, e))
}

/// Kernels before 6.12 mount a file only through a loop device.
fn mount_layer(layer: &Path, at: &Path) -> Result<()> {
    match mount(Some(layer), at, Some("erofs"), MsFlags::MS_RDONLY, NONE) {
        Ok(()) => Ok(()),
        Err(Errno::ENOTBLK) => mount_by_loop(layer, at),
        Err(Errno::ENODEV) => Err(Error::NoErofs),
        Err(errno) => Err(failed(layer, errno.into())),
    }
}

/// mount(8) takes a free loop device, which the kernel gives back with the
/// mount.
fn mount_by_loop(layer: &Path, at: &Path) -> Result<()> {
    let output = Command::new("mount")
        .args(["-t", "erofs", "-o", "ro,loop"])
        .args([layer, at])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failed(Path::new("mount"), e))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(Error::Tool {
        program: "mount",
        stderr: stderr.trim().replace('\n', " "),
    })
}

fn failed(path: &Path, source: io::Error) -> Error {
    Error::File {
        what: "root file system",
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(dir: &Path, name: &str, text: &str) -> PathBuf {
        let tree = dir.join(format!("{name}.d"));
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::write(tree.join("etc").join(name), text).unwrap();
        fs::write(tree.join("etc/both"), text).unwrap();
        let image = dir.join(format!("{name}.erofs"));
        let made = Command::new("mkfs.erofs").arg(&image).arg(&tree).output();
        assert!(made.unwrap().status.success());
        image
    }

    fn place(dir: &Path) -> Place {
        Place {
            bundle: dir.join("run/c"),
            writable: dir.join("disk/c"),
            trash: dir.join("trash"),
        }
    }

    fn mounts(dir: &Path) -> usize {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dir = dir.to_str().unwrap();
        table.lines().filter(|line| line.contains(dir)).count()
    }

    #[test]
    fn layers_are_stacked_written_to_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let layers = [
            layer(dir.path(), "low", "below"),
            layer(dir.path(), "high", "above"),
        ];
        let place = place(dir.path());
        place.mount(&layers).unwrap();
        let root = place.root();
        let read = |name: &str| fs::read_to_string(root.join("etc").join(name)).unwrap();
        assert_eq!(
            (read("low"), read("both")),
            ("below".into(), "above".into())
        );
        fs::write(root.join("new"), "x").unwrap();
        assert!(place.bundle.join(UPPER_LINK).join("new").exists());
        assert_eq!(mounts(&place.bundle), 1);
        place.remove().unwrap();
        place.remove().unwrap();
        assert_eq!(mounts(dir.path()), 0);
        assert!(!place.bundle.exists() && !place.writable.exists());
    }

    #[test]
    fn an_image_volume_is_read_only_and_its_links_stay_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let layers = [layer(dir.path(), "low", "below")];
        let tree = dir.path().join("linked.d");
        fs::create_dir_all(&tree).unwrap();
        symlink("/etc", tree.join("inside")).unwrap();
        let linked = layer(dir.path(), "linked", "above");
        let place = place(dir.path());
        place.mount(&layers).unwrap();
        let mount = |number, layers: &[PathBuf], sub_path: &str| {
            place.mount_volume(number, layers, Path::new("/v"), sub_path)
        };
        let both = [layers[0].clone(), linked];
        let whole = mount(0, &both, "").unwrap();
        assert_eq!(fs::read_to_string(whole.join("etc/low")).unwrap(), "below");
        let error = fs::write(whole.join("new"), "").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        let inside = mount(1, &both, "inside").unwrap();
        assert_eq!(inside, place.bundle.join("images/1/etc"));
        let above = mount(2, &layers, "../../../etc").unwrap();
        assert_eq!(above, place.bundle.join("images/2/etc"));
        assert_eq!(fs::read_dir(mount(3, &[], "").unwrap()).unwrap().count(), 0);
        let error = mount(4, &layers, "no/such").unwrap_err();
        assert!(matches!(&error, Error::ImageSubPath { .. }), "{error}");
        assert!(error.sentence().contains("/v"), "{error}");
        place.remove().unwrap();
        assert_eq!(mounts(dir.path()), 0);
    }

    #[test]
    fn an_image_without_layers_has_an_empty_root() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path());
        place.mount(&[]).unwrap();
        assert_eq!(fs::read_dir(place.root()).unwrap().count(), 0);
        place.remove().unwrap();
    }

    #[test]
    fn a_layer_that_is_none_is_named_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let bad = dir.path().join("bad.erofs");
        fs::write(&bad, vec![0; 8192]).unwrap();
        let good = layer(dir.path(), "low", "below");
        let place = place(dir.path());
        let error = place.mount(&[good, bad]).unwrap_err().sentence();
        assert!(error.contains("bad.erofs"), "{error}");
        assert_eq!(mounts(dir.path()), 0);
        assert!(!place.bundle.exists());
    }
}
