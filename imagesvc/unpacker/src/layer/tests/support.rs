//! Archives made by hand, images mounted by the host's kernel, and trees
//! compared in everything that `stat` and `getxattr` show.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{Cursor, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use tar::Header;
use tempfile::TempDir;

use crate::layer::{Compression, Converted, Error, Limits, convert};

/// Writes an archive member by member, valid or not.
#[derive(Default)]
pub(super) struct Tar(Vec<u8>);

impl Tar {
    pub(super) fn raw(&mut self, header: &mut Header, data: &[u8]) -> &mut Self {
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn member(&mut self, kind: u8, path: &[u8], link: &[u8], data: &[u8]) -> &mut Self {
        self.member_with(kind, path, link, data, |_| {})
    }

    pub(super) fn member_with(
        &mut self,
        kind: u8,
        path: &[u8],
        link: &[u8],
        data: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> &mut Self {
        if path.len() > 100 {
            self.long(b'L', path);
        }
        if link.len() > 100 {
            self.long(b'K', link);
        }
        let mut header = self.header(kind, path, data.len() as u64);
        let old = header.as_old_mut();
        let len = link.len().min(100);
        old.linkname[..len].copy_from_slice(&link[..len]);
        change(&mut header);
        self.raw(&mut header, data)
    }

    fn header(&self, kind: u8, path: &[u8], size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_size(size);
        let old = header.as_old_mut();
        old.linkflag = [kind];
        let len = path.len().min(100);
        old.name[..len].copy_from_slice(&path[..len]);
        header
    }

    fn long(&mut self, kind: u8, value: &[u8]) {
        let mut data = value.to_vec();
        data.push(0);
        let mut header = self.header(kind, b"././@LongLink", data.len() as u64);
        self.raw(&mut header, &data);
    }

    pub(super) fn pax(&mut self, records: &[(&[u8], &[u8])]) -> &mut Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut len = body + 1;
            while len.to_string().len() + body != len {
                len += 1;
            }
            data.extend(format!("{len} ").bytes());
            data.extend([*key, b"=", *value, b"\n"].concat());
        }
        let mut header = self.header(b'x', b"pax", data.len() as u64);
        self.raw(&mut header, &data)
    }

    pub(super) fn dir(&mut self, path: &str) -> &mut Self {
        self.member(b'5', path.as_bytes(), b"", b"")
    }

    pub(super) fn file(&mut self, path: &str, data: &[u8]) -> &mut Self {
        self.member(b'0', path.as_bytes(), b"", data)
    }

    pub(super) fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.member(b'2', path.as_bytes(), target.as_bytes(), b"")
    }

    pub(super) fn hard_link(&mut self, path: &str, target: &str) -> &mut Self {
        self.member(b'1', path.as_bytes(), target.as_bytes(), b"")
    }

    /// Members only, without an end mark.
    pub(super) fn unfinished(&self) -> Vec<u8> {
        self.0.clone()
    }

    pub(super) fn finish(&self) -> Vec<u8> {
        let mut bytes = self.0.clone();
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }
}

pub(super) fn image_of(tar: &[u8]) -> Result<(Vec<u8>, Converted), Error> {
    image_within(tar, &Limits::default())
}

pub(super) fn image_within(tar: &[u8], limits: &Limits) -> Result<(Vec<u8>, Converted), Error> {
    let mut out = Cursor::new(Vec::new());
    let converted = convert(tar, Compression::None, limits, &mut out)?;
    assert_eq!(out.get_ref().len() as u64, converted.erofs_len);
    assert_eq!(converted.erofs_len % 4096, 0);
    Ok((out.into_inner(), converted))
}

/// The error and its causes in one line, as a log shows it.
pub(super) fn message(err: &Error) -> String {
    let mut text = err.to_string();
    let mut source = std::error::Error::source(err);
    while let Some(err) = source {
        text = format!("{text}: {err}");
        source = err.source();
    }
    text
}

pub(super) fn error_of(tar: &Tar) -> String {
    message(&image_of(&tar.finish()).expect_err("the archive is bad"))
}

pub(super) fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|err| panic!("{command:?}: {err}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// An image that passed fsck and is mounted until dropped.
pub(super) struct Mounted {
    dir: TempDir,
}

impl Mounted {
    /// Converts `tar` and mounts what comes of it.
    pub(super) fn tar(tar: &[u8]) -> Self {
        match image_of(tar) {
            Ok((image, _)) => Self::image(&image),
            Err(err) => panic!("{}", message(&err)),
        }
    }

    pub(super) fn image(image: &[u8]) -> Self {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("image"), image).unwrap();
        Self::at(dir)
    }

    /// Mounts the file `image` in `dir`.
    pub(super) fn at(dir: TempDir) -> Self {
        let (image, root) = (dir.path().join("image"), dir.path().join("root"));
        // It reads an attribute header after every inode, also where there is
        // none and the image ends; a disk would go on there.
        let file = fs::File::options().write(true).open(&image).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(len + 4096).unwrap();
        // It recurses with a path's worth of stack a directory.
        run(Command::new("sh")
            .args(["-c", "ulimit -s unlimited && exec fsck.erofs \"$0\""])
            .arg(&image));
        file.set_len(len).unwrap();
        drop(file);
        fs::create_dir(&root).unwrap();
        run(Command::new("mount")
            .args(["-t", "erofs", "-o", "loop,ro"])
            .args([&image, &root]));
        Self { dir }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub(super) fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.path().join(path)).unwrap()
    }

    pub(super) fn stat(&self, path: &str) -> Stat {
        stat(&self.path().join(path))
    }

    pub(super) fn names(&self, path: &str) -> Vec<String> {
        names(&self.path().join(path))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.path());
    }
}

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// Layers stacked as a container's root is, without anything to write to.
pub(super) struct Overlay {
    root: TempDir,
    _layers: Vec<Mounted>,
}

impl Overlay {
    /// The highest layer first.
    pub(super) fn of(tars: &[&[u8]]) -> Self {
        Self::stack(tars.iter().map(|tar| Mounted::tar(tar)).collect())
    }

    /// The highest first.
    pub(super) fn of_images(images: &[Vec<u8>]) -> Self {
        Self::stack(images.iter().map(|image| Mounted::image(image)).collect())
    }

    fn stack(layers: Vec<Mounted>) -> Self {
        let paths: Vec<String> = layers
            .iter()
            .map(|layer| layer.path().to_str().unwrap().to_owned())
            .collect();
        let root = TempDir::new().unwrap();
        run(Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o"])
            .arg(format!("ro,lowerdir={}", paths.join(":")))
            .arg(root.path()));
        Self {
            root,
            _layers: layers,
        }
    }

    pub(super) fn names(&self, path: &str) -> Vec<String> {
        names(&self.root.path().join(path))
    }

    pub(super) fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.root.path().join(path)).unwrap()
    }

    pub(super) fn stat(&self, path: &str) -> Stat {
        stat(&self.root.path().join(path))
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        unmount(self.root.path());
    }
}

fn unmount(path: &Path) {
    let status = Command::new("umount").arg(path).status();
    if !std::thread::panicking() {
        assert!(status.unwrap().success(), "umount {path:?}");
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, i64),
    pub(super) rdev: u64,
    pub(super) nlink: u64,
    /// Of files and symbolic links.
    pub(super) size: u64,
    pub(super) link: Option<PathBuf>,
    pub(super) xattrs: BTreeMap<OsString, Vec<u8>>,
    /// The first path that leads to the same inode.
    pub(super) first: Option<PathBuf>,
}

impl Stat {
    pub(super) fn xattr(&self, name: &str) -> Option<&[u8]> {
        self.xattrs
            .get(std::ffi::OsStr::new(name))
            .map(Vec::as_slice)
    }

    pub(super) fn is_whiteout(&self) -> bool {
        self.mode & 0o170_000 == 0o020_000 && self.rdev == 0
    }

    pub(super) fn is_opaque(&self) -> bool {
        self.xattr("trusted.overlay.opaque") == Some(b"y")
    }
}

pub(super) fn stat(path: &Path) -> Stat {
    stat_of(path, &fs::symlink_metadata(path).unwrap())
}

fn stat_of(path: &Path, meta: &Metadata) -> Stat {
    let xattrs = xattr::list(path).unwrap().map(|name| {
        let value = xattr::get(path, &name).unwrap().unwrap();
        (name, value)
    });
    Stat {
        mode: meta.mode(),
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        rdev: meta.rdev(),
        nlink: meta.nlink(),
        size: if meta.is_dir() { 0 } else { meta.size() },
        link: meta.is_symlink().then(|| fs::read_link(path).unwrap()),
        xattrs: xattrs.collect(),
        first: None,
    }
}

/// Everything below `root`, and `root` itself.
pub(super) fn snapshot(root: &Path) -> BTreeMap<PathBuf, Stat> {
    let mut found = BTreeMap::new();
    let mut names: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    let mut left = vec![(PathBuf::new(), fs::symlink_metadata(root).unwrap())];
    while let Some((path, meta)) = left.pop() {
        let full = root.join(&path);
        if meta.is_dir() {
            for entry in fs::read_dir(&full).unwrap() {
                let entry = entry.unwrap();
                let meta = entry.metadata().unwrap();
                // What readdir says of a name is what stat says.
                assert_eq!(entry.file_type().unwrap(), meta.file_type());
                assert_eq!(entry.ino(), meta.ino());
                left.push((path.join(entry.file_name()), meta));
            }
        }
        names.entry(meta.ino()).or_default().push(path.clone());
        found.insert(path, stat_of(&full, &meta));
    }
    for paths in names.values() {
        let first = paths.iter().min().cloned();
        for path in paths {
            found.get_mut(path).unwrap().first = first.clone();
        }
    }
    found
}

/// Panics at the first difference between two trees.
pub(super) fn assert_same(expected: &Path, actual: &Path) {
    let (left, right) = (snapshot(expected), snapshot(actual));
    for path in left.keys().chain(right.keys()) {
        assert_eq!(left.get(path), right.get(path), "{path:?}");
    }
    for (path, stat) in left {
        if stat.mode & 0o170_000 == 0o100_000 {
            assert_same_content(&expected.join(&path), &actual.join(&path));
        }
    }
}

fn assert_same_content(left: &Path, right: &Path) {
    const PIECE: u64 = 1 << 20;
    let (mut a, mut b) = (File::open(left).unwrap(), File::open(right).unwrap());
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    loop {
        ours.clear();
        theirs.clear();
        a.by_ref().take(PIECE).read_to_end(&mut ours).unwrap();
        b.by_ref().take(PIECE).read_to_end(&mut theirs).unwrap();
        assert!(ours == theirs, "{left:?} and {right:?} differ");
        if ours.is_empty() {
            return;
        }
    }
}

/// What GNU tar makes of an archive.
pub(super) fn extract(archive: &Path) -> TempDir {
    let dir = TempDir::new().unwrap();
    run(Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--same-owner"])
        .args(["--numeric-owner", "-p", "-x", "-f"])
        .arg(archive)
        .arg("-C")
        .arg(dir.path()));
    dir
}

/// Converts the archive at `archive`, and compares the mounted image with
/// what GNU tar makes of it.
pub(super) fn assert_like_gnu_tar(archive: &Path) {
    let expected = extract(archive);
    let dir = TempDir::new().unwrap();
    let out = File::create(dir.path().join("image")).unwrap();
    let input = File::open(archive).unwrap();
    if let Err(err) = convert(input, Compression::None, &Limits::default(), out) {
        panic!("{}", message(&err));
    }
    let mounted = Mounted::at(dir);
    assert_same(expected.path(), &mounted.path());
}

pub(super) fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}
