//! Image layers, made in memory from packages and from what a test invents.

use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Plain,
    Gzip,
    Zstd,
}

/// A finished layer.
#[derive(Clone)]
pub struct Layer {
    pub blob: Vec<u8>,
    pub compression: Compression,
    /// Digest of the blob.
    pub digest: String,
    /// Digest of the tar inside.
    pub diff_id: String,
}

/// `sha256:` and the digest of `bytes`.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().fold(String::from("sha256:"), |text, byte| {
        format!("{text}{byte:02x}")
    })
}

pub struct LayerBuilder {
    tar: tar::Builder<Vec<u8>>,
}

impl Default for LayerBuilder {
    fn default() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
        }
    }
}

/// Entries are written in the order of the calls. Paths are relative.
impl LayerBuilder {
    /// All files of a Debian package, those under `/usr/share` left out.
    pub fn package(self, deb: &Path) -> Result<Self> {
        self.package_files(deb, |path| !path.starts_with("usr/share"))
    }

    /// The files of a Debian package that `wanted` names.
    pub fn package_files(mut self, deb: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Self> {
        let contents = crate::debian::contents(deb)?;
        let mut archive = tar::Archive::new(contents.as_slice());
        for entry in archive.entries().context("package contents")? {
            let mut entry = entry.context("package entry")?;
            let path = entry.path().context("package entry's path")?.into_owned();
            let path = path.strip_prefix("./").unwrap_or(&path).to_owned();
            if path.as_os_str().is_empty() || !wanted(&path) {
                continue;
            }
            let mut header = entry.header().clone();
            let link = entry
                .link_name()
                .context("package entry's link")?
                .map(|link| link.into_owned());
            match link {
                Some(link) => self.tar.append_link(&mut header, &path, link)?,
                None => {
                    let mut data = Vec::new();
                    entry
                        .read_to_end(&mut data)
                        .context("package entry's data")?;
                    self.tar.append_data(&mut header, &path, data.as_slice())?;
                }
            }
        }
        Ok(self)
    }

    pub fn dir(self, path: &str, mode: u32) -> Result<Self> {
        self.entry(path, EntryType::Directory, mode, 0, &[])
    }

    pub fn file(self, path: &str, mode: u32, data: &[u8]) -> Result<Self> {
        self.entry(path, EntryType::Regular, mode, 0, data)
    }

    /// A file that belongs to uid and gid `owner`.
    pub fn owned_file(self, path: &str, mode: u32, owner: u64, data: &[u8]) -> Result<Self> {
        self.entry(path, EntryType::Regular, mode, owner, data)
    }

    pub fn symlink(self, path: &str, target: &str) -> Result<Self> {
        self.link(path, EntryType::Symlink, target, 0o777)
    }

    /// The mode is the target's, as tar writes it.
    pub fn hardlink(self, path: &str, target: &str, mode: u32) -> Result<Self> {
        self.link(path, EntryType::Link, target, mode)
    }

    pub fn char_device(mut self, path: &str, major: u32, minor: u32) -> Result<Self> {
        let mut header = header(EntryType::Char, 0o666, 0, 0);
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        self.tar.append_data(&mut header, path, std::io::empty())?;
        Ok(self)
    }

    /// A file with an extended attribute.
    pub fn file_with_xattr(
        mut self,
        path: &str,
        data: &[u8],
        name: &str,
        value: &[u8],
    ) -> Result<Self> {
        let key = format!("SCHILY.xattr.{name}");
        self.tar.append_pax_extensions([(key.as_str(), value)])?;
        self.file(path, 0o755, data)
    }

    /// An entry whose name and link target are written as they are, valid or
    /// not.
    pub fn raw(mut self, name: &[u8], kind: EntryType, target: &[u8]) -> Result<Self> {
        let mut header = header(kind, 0o777, 0, 0);
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name);
        old.linkname[..target.len()].copy_from_slice(target);
        header.set_cksum();
        self.tar.append(&header, std::io::empty())?;
        Ok(self)
    }

    pub fn build(self, compression: Compression) -> Result<Layer> {
        let tar = self.tar.into_inner().context("finish the layer")?;
        Layer::from_tar(&tar, compression)
    }

    fn entry(
        mut self,
        path: &str,
        kind: EntryType,
        mode: u32,
        owner: u64,
        data: &[u8],
    ) -> Result<Self> {
        let mut header = header(kind, mode, owner, data.len() as u64);
        self.tar
            .append_data(&mut header, path, data)
            .with_context(|| path.to_owned())?;
        Ok(self)
    }

    fn link(mut self, path: &str, kind: EntryType, target: &str, mode: u32) -> Result<Self> {
        let mut header = header(kind, mode, 0, 0);
        self.tar
            .append_link(&mut header, path, target)
            .with_context(|| path.to_owned())?;
        Ok(self)
    }
}

impl Layer {
    pub fn from_tar(tar: &[u8], compression: Compression) -> Result<Self> {
        let blob = match compression {
            Compression::Plain => tar.to_vec(),
            Compression::Gzip => {
                let mut gzip =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(tar)?;
                gzip.finish()?
            }
            Compression::Zstd => zstd::encode_all(tar, 1)?,
        };
        Ok(Self {
            digest: digest(&blob),
            diff_id: digest(tar),
            blob,
            compression,
        })
    }
}

/// Layers are the same bytes in every run: the time is always the same.
fn header(kind: EntryType, mode: u32, owner: u64, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owner);
    header.set_gid(owner);
    header.set_size(size);
    header.set_mtime(1_600_000_000);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_entries_give_the_same_digest() {
        let build = || {
            let layer = LayerBuilder::default()
                .dir("etc", 0o755)
                .unwrap()
                .file("etc/a", 0o644, b"x")
                .unwrap();
            layer.build(Compression::Gzip).unwrap()
        };
        assert_eq!(build().digest, build().digest);
        assert_ne!(build().digest, build().diff_id);
    }

    #[test]
    fn a_digest_is_what_sha256sum_prints() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest(b""), empty);
    }
}
