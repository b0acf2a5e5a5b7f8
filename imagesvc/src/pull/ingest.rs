//! One layer from its compressed bytes to its EROFS file.
//!
//! ```text
//! registry ──channel──▶ Tee ──▶ unpackers ──▶ tmp/… ──▶ layers/…
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
use unpacker_client::Stop;

use crate::{
    digest::{Digest, Hasher},
    error::{LayerError, StoreError},
    manifest::LayerBlob,
    observer::Observer,
    store::{Files, LayerOnDisk, remove_file},
    unpack::{Packed, Unpacking},
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

/// Where a download's other end is told how it goes.
pub(super) struct Told {
    /// How many bytes are there already: the feed brings the others.
    pub(super) start: oneshot::Sender<u64>,
    /// Dropped when no more of them are of use.
    pub(super) enough: oneshot::Sender<()>,
}

/// Takes what is there and what `feed` brings, until `stop`. The layer becomes
/// visible only if every byte was right.
pub(super) fn ingest(
    files: &Files,
    layer: &LayerBlob,
    unpacking: &Unpacking,
    told: Told,
    feed: Feed,
    stop: &Stop,
) -> Result<Ingested, LayerError> {
    let path = files.ingest(&layer.blob.digest);
    let mut tee = Tee::open(path.clone(), &layer.blob.digest, layer.blob.size, feed)?;
    if told.start.send(tee.on_disk).is_err() {
        return Err(LayerError::Stopped);
    }
    let out = files.temporary()?;
    let packed = Packed {
        digest: &layer.blob.digest,
        size: layer.blob.size,
        declared: layer.compression,
    };
    let unpacked = unpacking.layer(packed, &mut tee, told.enough, out.as_file(), stop);
    let unpacked = match (unpacked.map_err(LayerError::from), tee.failure.take()) {
        (_, Some(failure)) if !matches!(failure, LayerError::Stopped) => return Err(failure),
        (Err(LayerError::Stopped), _) => {
            // What has come is kept.
            tee.drain()?;
            return Err(LayerError::Stopped);
        }
        // That the feed has ended is of its making.
        (unpacked, _) => unpacked?,
    };
    tee.drain()?;
    let actual = tee.hasher.finish();
    if actual != layer.blob.digest {
        return Err(LayerError::Digest { actual });
    }
    let written = unpacked.written;
    let published = files.layer(&unpacked.diff_id, written.opaque_root);
    files.publish(out, &published)?;
    remove_file(&path)?;
    if written.dropped_xattrs > 0 {
        tracing::info!(
            layer = %layer.blob.digest,
            count = written.dropped_xattrs,
            "extended attributes left out"
        );
    }
    Ok(Ingested {
        diff_id: unpacked.diff_id,
        on_disk: LayerOnDisk {
            path: published,
            len: written.erofs_len,
            opaque: written.opaque_root,
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
