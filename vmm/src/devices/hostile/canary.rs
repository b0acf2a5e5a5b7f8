//! A tree that nobody may touch, beside one that a guest may.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

/// The directory of which all but [`SHARE`] is watched.
pub(crate) struct Canary {
    root: PathBuf,
    before: Vec<Entry>,
}

/// The guest's directory in it.
const SHARE: &str = "share";

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    path: PathBuf,
    mode: u32,
    owner: (u32, u32),
    links: u64,
    changed: (i64, i64),
    content: Vec<u8>,
}

impl Canary {
    /// Fills `root`, an empty directory.
    pub(crate) fn new(root: &Path) -> io::Result<Self> {
        let beside = root.join("beside");
        fs::create_dir_all(beside.join("dir"))?;
        fs::write(beside.join("file"), "not the guest's")?;
        fs::write(beside.join("dir/file"), "nor this")?;
        symlink("file", beside.join("link"))?;
        let canary = Self::at(root)?;
        canary.clear_share()?;
        Ok(canary)
    }

    /// What was made in `root` before.
    pub(crate) fn at(root: &Path) -> io::Result<Self> {
        let mut canary = Self {
            root: root.to_owned(),
            before: Vec::new(),
        };
        canary.before = canary.entries()?;
        Ok(canary)
    }

    pub(crate) fn share(&self) -> PathBuf {
        self.root.join(SHARE)
    }

    /// The guest's directory as it was in the beginning: a file, a directory
    /// and a link.
    pub(crate) fn clear_share(&self) -> io::Result<()> {
        let share = self.share();
        if share.exists() {
            fs::remove_dir_all(&share)?;
        }
        fs::create_dir_all(share.join("dir/inner"))?;
        fs::write(share.join("file"), [7; 10_000])?;
        symlink("../beside", share.join("link"))
    }

    /// # Panics
    ///
    /// When something beside the guest's directory is not what it was, or a
    /// device's file is in that directory.
    pub(crate) fn assert_unharmed(&self) -> io::Result<()> {
        assert_eq!(self.entries()?, self.before, "changed beside the share");
        each(&self.share(), &mut |path, meta| {
            let kind = meta.file_type();
            let device = kind.is_block_device() || (kind.is_char_device() && meta.rdev() != 0);
            assert!(!device, "a device's file: {}", path.display());
            Ok(())
        })
    }

    /// All but the share, and that there is nothing new beside it.
    fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let share = self.share();
        each(&self.root, &mut |path, meta| {
            if path.starts_with(&share) {
                return Ok(());
            }
            entries.push(Entry {
                path: path.to_owned(),
                mode: meta.mode(),
                owner: (meta.uid(), meta.gid()),
                links: meta.nlink(),
                changed: (meta.ctime(), meta.ctime_nsec()),
                content: if meta.is_file() {
                    fs::read(path)?
                } else {
                    Vec::new()
                },
            });
            Ok(())
        })?;
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(entries)
    }
}

/// Everything below `dir`; links are not followed.
fn each(dir: &Path, see: &mut dyn FnMut(&Path, &fs::Metadata) -> io::Result<()>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let meta = fs::symlink_metadata(&path)?;
        see(&path, &meta)?;
        if meta.is_dir() {
            each(&path, see)?;
        }
    }
    Ok(())
}
