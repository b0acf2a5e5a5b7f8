//! Where things lie below the store's root, and how files come to be there
//! whole or not at all.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use serde::Serialize;
use tempfile::NamedTempFile;

use crate::{digest::Digest, error::StoreError};

/// Paths below the root:
///
/// ```text
/// lock                          held while the store is open
/// images/HEX.json               one record an image, HEX of its id
/// leases/HEX.json               one an owner, HEX of the owner's sha256
/// pulls/N.json                  one a pull under way or interrupted
/// layers/v2/HEX.erofs           HEX of the layer's diff id
/// layers/v2/HEX.opaque.erofs    one that hides all layers below it
/// layers/v2/HEX.directories.erofs   put on top of layers, HEX of their chain id
/// ingest/sha256-HEX             compressed bytes of an unfinished layer
/// tmp/                          files that are being written
/// ```
#[derive(Clone, Debug)]
pub(crate) struct Files {
    root: PathBuf,
}

/// Of how layers are converted. Those of another version are deleted, and
/// their images pulled again: their archives are not kept.
///
/// 1, which was `layers/sha256`, did not mark implied directories.
const LAYERS_VERSION: &str = "v2";

const OPAQUE_SUFFIX: &str = ".opaque.erofs";
const DIRECTORIES_SUFFIX: &str = ".directories.erofs";
const LAYER_SUFFIX: &str = ".erofs";

/// A converted layer on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerOnDisk {
    pub(crate) path: PathBuf,
    pub(crate) len: u64,
    pub(crate) opaque: bool,
}

impl Files {
    /// Creates the directories that are missing.
    pub(crate) fn create(root: &Path) -> Result<Self, StoreError> {
        let files = Self {
            root: root.to_owned(),
        };
        for dir in [
            files.root.clone(),
            files.images(),
            files.leases(),
            files.pulls(),
            files.layers(),
            files.ingest_dir(),
            files.tmp(),
        ] {
            // Images are nobody's business but the daemon's.
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .map_err(|e| StoreError::io(&dir, e))?;
        }
        Ok(files)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(super) fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub(super) fn leases(&self) -> PathBuf {
        self.root.join("leases")
    }

    pub(super) fn pulls(&self) -> PathBuf {
        self.root.join("pulls")
    }

    /// DiffIDs are sha256 here: that is what the conversion computes.
    pub(super) fn layers(&self) -> PathBuf {
        self.all_layers().join(LAYERS_VERSION)
    }

    fn all_layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Deletes the layers that an earlier or later version has converted.
    pub(super) fn remove_other_versions(&self) -> Result<(), StoreError> {
        for path in list(&self.all_layers())? {
            if path == self.layers() {
                continue;
            }
            tracing::warn!(path = %path.display(), "layers of another format removed: their images have to be pulled again");
            let removed = match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&path),
                Ok(_) => fs::remove_file(&path),
                Err(e) => Err(e),
            };
            removed.map_err(|e| StoreError::io(path, e))?;
        }
        Ok(())
    }

    pub(super) fn ingest_dir(&self) -> PathBuf {
        self.root.join("ingest")
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    pub(crate) fn ingest(&self, digest: &Digest) -> PathBuf {
        self.ingest_dir().join(ingest_name(digest))
    }

    pub(crate) fn layer(&self, diff_id: &Digest, opaque: bool) -> PathBuf {
        let suffix = if opaque { OPAQUE_SUFFIX } else { LAYER_SUFFIX };
        self.layers().join(format!("{}{suffix}", diff_id.hex()))
    }

    /// The layer that goes on top of those with `chain_id`, for the images that
    /// need one: see `imagesvc/unpacker/src/layer/inherit.rs`.
    pub(crate) fn directories(&self, chain_id: &Digest) -> PathBuf {
        let name = format!("{}{DIRECTORIES_SUFFIX}", chain_id.hex());
        self.layers().join(name)
    }

    /// Its length, if it is there; one that is there is whole.
    pub(crate) fn find_directories(&self, chain_id: &Digest) -> Result<Option<u64>, StoreError> {
        let path = self.directories(chain_id);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(StoreError::io(path, e)),
        }
    }

    /// The layer, if it is there; a layer that is there is whole.
    pub(crate) fn find_layer(&self, diff_id: &Digest) -> Result<Option<LayerOnDisk>, StoreError> {
        for opaque in [false, true] {
            let path = self.layer(diff_id, opaque);
            match fs::metadata(&path) {
                Ok(metadata) => {
                    let len = metadata.len();
                    return Ok(Some(LayerOnDisk { path, len, opaque }));
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(StoreError::io(path, e)),
            }
        }
        Ok(None)
    }

    /// A file in `tmp`, gone when dropped.
    pub(crate) fn temporary(&self) -> Result<NamedTempFile, StoreError> {
        NamedTempFile::new_in(self.tmp()).map_err(|e| StoreError::io(self.tmp(), e))
    }

    /// Puts a finished file in its place, durably.
    pub(crate) fn publish(&self, file: NamedTempFile, path: &Path) -> Result<(), StoreError> {
        let failed = |e| StoreError::io(path, e);
        file.as_file().sync_all().map_err(failed)?;
        file.persist(path).map_err(|e| failed(e.error))?;
        sync_parent(path)
    }

    /// Replaces the file at `path` by `record` as JSON, durably.
    pub(super) fn write_record(
        &self,
        path: &Path,
        record: &impl Serialize,
    ) -> Result<(), StoreError> {
        let file = self.written(path, record)?;
        self.publish(file, path)
    }

    /// The same, but a power cut may undo it or leave an empty file.
    pub(super) fn write_record_unsynced(
        &self,
        path: &Path,
        record: &impl Serialize,
    ) -> Result<(), StoreError> {
        let file = self.written(path, record)?;
        file.persist(path)
            .map_err(|e| StoreError::io(path, e.error))?;
        Ok(())
    }

    fn written(&self, path: &Path, record: &impl Serialize) -> Result<NamedTempFile, StoreError> {
        let mut file = self.temporary()?;
        let json = serde_json::to_vec(record).map_err(|e| StoreError::io(path, e.into()))?;
        file.write_all(&json).map_err(|e| StoreError::io(path, e))?;
        Ok(file)
    }

    /// Deletes a record; one that is not there is no error.
    pub(super) fn remove_record(&self, path: &Path) -> Result<(), StoreError> {
        remove_file(path)?;
        sync_parent(path)
    }

    /// Blocks and inodes that everything below the root takes.
    pub(crate) fn usage(&self) -> Result<(u64, u64), StoreError> {
        let mut used = (0, 0);
        let mut dirs = vec![self.root.clone()];
        while let Some(dir) = dirs.pop() {
            for path in list(&dir)? {
                // Files come and go meanwhile.
                let metadata = match fs::symlink_metadata(&path) {
                    Ok(metadata) => metadata,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(StoreError::io(path, e)),
                };
                used.0 += metadata.blocks() * 512;
                used.1 += 1;
                if metadata.is_dir() {
                    dirs.push(path);
                }
            }
        }
        Ok(used)
    }
}

pub(super) fn ingest_name(digest: &Digest) -> String {
    digest.as_str().replace(':', "-")
}

/// What a file in the layers' directory is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum LayerName {
    /// By its DiffID.
    Layer(Digest),
    /// By the ChainID of the layers below.
    Directories(Digest),
}

impl LayerName {
    pub(super) fn parse(name: &str) -> Option<Self> {
        let digest = |hex: &str| format!("sha256:{hex}").parse().ok();
        if let Some(hex) = name.strip_suffix(DIRECTORIES_SUFFIX) {
            return digest(hex).map(Self::Directories);
        }
        let hex = name
            .strip_suffix(OPAQUE_SUFFIX)
            .or_else(|| name.strip_suffix(LAYER_SUFFIX))?;
        digest(hex).map(Self::Layer)
    }
}

/// A file that is not there is no error.
pub(crate) fn remove_file(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::io(path, e)),
        _ => Ok(()),
    }
}

/// Everything in a directory; one that is not there is empty.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(StoreError::io(dir, e)),
    };
    entries
        .map(|entry| Ok(entry.map_err(|e| StoreError::io(dir, e))?.path()))
        .collect()
}

fn sync_parent(path: &Path) -> Result<(), StoreError> {
    let parent = path.parent().unwrap_or(path);
    File::open(parent)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| StoreError::io(parent, e))
}
