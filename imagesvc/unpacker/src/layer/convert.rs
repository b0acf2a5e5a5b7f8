//! Both halves in one process, for tests and fuzzers.

use std::cell::Cell;
use std::io::{self, Read, Seek, Write};
use std::rc::Rc;

use sha2::{Digest, Sha256};
use unpacker_client::image_uuid;

use super::{Compression, Decompressed, Error, LimitError, Limits, write};

/// A layer that was converted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    pub erofs_len: u64,
    /// SHA-256 of the uncompressed archive: the layer's DiffID.
    pub diff_id: [u8; 32],
    pub uncompressed_len: u64,
    pub entries: u64,
    pub dropped_xattrs: u64,
    pub opaque_root: bool,
}

/// Reads a layer as a registry sent it and writes its image, with the checks
/// that the daemon makes between the two.
///
/// # Errors
/// See [`Error`].
pub fn convert(
    reader: impl Read,
    declared: Compression,
    limits: &Limits,
    out: impl Write + Seek,
) -> Result<Converted, Error> {
    let failed = |source| Error::Read { offset: 0, source };
    let received = Rc::default();
    let counted = Counted {
        inner: reader,
        count: Rc::clone(&received),
    };
    let decompressed = Decompressed::new(counted, declared).map_err(failed)?;
    let between = Rc::new(Between::default());
    let archive = Checked {
        inner: decompressed,
        limits: *limits,
        received: Rc::clone(&received),
        between: Rc::clone(&between),
    };
    let uuid = || Ok(image_uuid(&between.digest()));
    let written = write(archive, limits, received, out, uuid).map_err(|error| match error {
        Error::Read { offset, source } => match limit_in(&source) {
            Some(limit) => Error::Limit(limit),
            None => Error::Read { offset, source },
        },
        error => error,
    })?;
    Ok(Converted {
        erofs_len: written.erofs_len,
        diff_id: between.digest(),
        uncompressed_len: between.produced.get(),
        entries: written.entries,
        dropped_xattrs: written.dropped_xattrs,
        opaque_root: written.opaque_root,
    })
}

/// What is known of the bytes between the two.
#[derive(Default)]
struct Between {
    hasher: Cell<Sha256>,
    produced: Cell<u64>,
}

impl Between {
    fn update(&self, bytes: &[u8]) {
        let mut hasher = self.hasher.take();
        hasher.update(bytes);
        self.hasher.set(hasher);
        self.produced.set(self.produced.get() + bytes.len() as u64);
    }

    fn digest(&self) -> [u8; 32] {
        let hasher = self.hasher.take();
        self.hasher.set(hasher.clone());
        hasher.finalize().into()
    }
}

struct Counted<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.count.set(self.count.get() + len as u64);
        Ok(len)
    }
}

struct Checked<R> {
    inner: R,
    limits: Limits,
    received: Rc<Cell<u64>>,
    between: Rc<Between>,
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.between.update(&buffer[..len]);
        self.limits
            .check(self.received.get(), self.between.produced.get())
            .map_err(io::Error::other)?;
        Ok(len)
    }
}

/// The bound that made reading fail, if that was it.
fn limit_in(err: &io::Error) -> Option<LimitError> {
    err.get_ref()?.downcast_ref::<LimitError>().copied()
}
