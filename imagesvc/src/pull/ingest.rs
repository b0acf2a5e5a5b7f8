//! One layer from its compressed bytes to its EROFS file, in one blocking
//! thread.
//!
//! ```text
//! registry ──channel──▶ Tee ──▶ decompress, convert ──▶ tmp/… ──▶ layers/…
//!                        └─▶ ingest/… (until the layer is done)
//! ```
//!
//! The bytes are kept on disk as they come, so that a pull that was cut, or
//! whose daemon was killed, goes on there. They are not synced: a damaged file
//! shows in its digest, and is fetched anew.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::Arc,
};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::{
    digest::{Digest, Hasher},
    error::{LayerError, StoreError},
    layer::{self, Limits},
    manifest::LayerBlob,
    observer::Observer,
    store::{Files, LayerOnDisk, remove_file},
};

/// Pieces in which what follows the archive is read.
const DRAIN_BUFFER: usize = 64 * 1024;

/// A layer that is in its place.
#[derive(Clone, Debug)]
pub(super) struct Ingested {
    pub(super) diff_id: Digest,
    pub(super) on_disk: LayerOnDisk,
}

/// What comes from the registry.
pub(super) struct Feed {
    pub(super) pieces: mpsc::Receiver<Bytes>,
    pub(super) observer: Arc<dyn Observer>,
}

impl Feed {
    fn next(&mut self) -> Option<Bytes> {
        let piece = self.pieces.blocking_recv()?;
        self.observer.layer_bytes(piece.len() as u64);
        Some(piece)
    }
}

/// Sends to `start` how many bytes are there already; `feed` brings the
/// others. The layer becomes visible only if every byte was right.
pub(super) fn ingest(
    files: &Files,
    layer: &LayerBlob,
    limits: &Limits,
    start: oneshot::Sender<u64>,
    feed: Feed,
) -> Result<Ingested, LayerError> {
    let path = files.ingest(&layer.blob.digest);
    let mut tee = Tee::open(path.clone(), &layer.blob.digest, layer.blob.size, feed)?;
    if start.send(tee.on_disk).is_err() {
        return Err(LayerError::Stopped);
    }
    let mut out = files.temporary()?;
    let converted = layer::convert(&mut tee, layer.compression, limits, out.as_file_mut());
    let converted = match (converted, tee.failure.take()) {
        (_, Some(failure)) => return Err(failure),
        (Err(error), None) => return Err(error.into()),
        (Ok(converted), None) => converted,
    };
    tee.drain()?;
    let actual = tee.hasher.finish();
    if actual != layer.blob.digest {
        return Err(LayerError::Digest { actual });
    }
    let diff_id = Digest::from_sha256(&converted.diff_id);
    let published = files.layer(&diff_id, converted.opaque_root);
    files.publish(out, &published)?;
    remove_file(&path)?;
    if converted.dropped_xattrs > 0 {
        tracing::info!(
            layer = %layer.blob.digest,
            count = converted.dropped_xattrs,
            "extended attributes left out"
        );
    }
    Ok(Ingested {
        diff_id,
        on_disk: LayerOnDisk {
            path: published,
            len: converted.erofs_len,
            opaque: converted.opaque_root,
        },
    })
}

/// Reads what is on disk, then what comes, which it writes behind that; hashes
/// both.
struct Tee {
    path: PathBuf,
    file: File,
    /// Bytes that were there at the start, and how many of them are to be read.
    on_disk: u64,
    to_reread: u64,
    position: u64,
    size: u64,
    hasher: Hasher,
    feed: Feed,
    current: Bytes,
    /// Why reading failed: the reader of this stream makes its own of it.
    failure: Option<LayerError>,
}

impl Tee {
    fn open(path: PathBuf, digest: &Digest, size: u64, feed: Feed) -> Result<Self, StoreError> {
        let failed = |e| StoreError::io(&path, e);
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        let mut on_disk = file.metadata().map_err(failed)?.len();
        if on_disk > size {
            file.set_len(0).map_err(failed)?;
            on_disk = 0;
        }
        Ok(Self {
            path,
            file,
            on_disk,
            to_reread: on_disk,
            position: 0,
            size,
            hasher: Hasher::new(digest.algorithm()),
            feed,
            current: Bytes::new(),
            failure: None,
        })
    }

    /// The archive may end before the blob does.
    fn drain(&mut self) -> Result<(), LayerError> {
        let mut buffer = vec![0; DRAIN_BUFFER];
        loop {
            match self.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) => {
                    let path = &self.path;
                    return Err(self
                        .failure
                        .take()
                        .unwrap_or_else(|| StoreError::io(path, error).into()));
                }
            }
        }
    }

    fn fail(&mut self, failure: LayerError) -> io::Error {
        let error = io::Error::new(io::ErrorKind::ConnectionAborted, failure.to_string());
        self.failure = Some(failure);
        error
    }

    fn reread(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.to_reread).map_or(buffer.len(), |n| n.min(buffer.len()));
        let read = match self.file.read(&mut buffer[..want]) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            other => other,
        };
        match read {
            Ok(len) => {
                self.hasher.update(&buffer[..len]);
                self.to_reread -= len as u64;
                Ok(len)
            }
            Err(e) => {
                let failure = StoreError::io(&self.path, e).into();
                Err(self.fail(failure))
            }
        }
    }
}

impl Read for Tee {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position == self.size || buffer.is_empty() {
            return Ok(0);
        }
        let len = if self.to_reread > 0 {
            self.reread(buffer)?
        } else {
            while self.current.is_empty() {
                let Some(bytes) = self.feed.next() else {
                    return Err(self.fail(LayerError::Stopped));
                };
                if let Err(e) = self.file.write_all(&bytes) {
                    let failure = StoreError::io(&self.path, e).into();
                    return Err(self.fail(failure));
                }
                self.hasher.update(&bytes);
                self.current = bytes;
            }
            let len = self.current.len().min(buffer.len());
            buffer[..len].copy_from_slice(&self.current.split_to(len));
            len
        };
        self.position += len as u64;
        Ok(len)
    }
}
