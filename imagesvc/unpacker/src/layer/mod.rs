//! Layers become images: a tar stream in, an EROFS file system out.
//!
//! [`Decompressed`] reads a layer as the registry sent it, [`write`] reads what
//! that gives (OCI image spec, "Image Layer Filesystem Changeset") and writes
//! the image as it goes: file data is neither kept in memory nor written twice.
//! Each runs in a process of its own (see `unpacker-client`); for tests and
//! fuzzers `convert` is both.
//!
//! The image is what overlayfs takes for a lower layer: a whiteout is a 0/0
//! character device, an opaque directory has `trusted.overlay.opaque=y`. The
//! same archive gives the same bytes, however it was compressed.
//!
//! A layer is converted without the layers below it, so a path through a
//! symbolic link that only a lower layer has makes a directory of that name. A
//! directory that only appears as the parent of another entry gets mode 0755
//! and a mark; once an image's layers are all there, [`Restored`] gives such
//! directories what the lower layers say of them.

mod archive;
mod build;
#[cfg(any(test, feature = "hostile"))]
mod convert;
mod decompress;
mod error;
mod header;
mod inherit;
mod mark;
mod path;
mod pax;
mod resolve;
mod source;
mod sparse;

#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::io::{self, Read, Seek, Write};
use std::rc::Rc;

pub use unpacker_client::{Compression, LimitError, Limits, Written};

#[cfg(any(test, feature = "hostile"))]
pub use convert::{Converted, convert};
pub use decompress::Decompressed;
pub use error::{EntryError, Error, HardLinkReason};
pub use inherit::Restored;
pub use path::PathError;
pub use pax::PaxError;
pub use sparse::SparseError;

use archive::Archive;
use build::Builder;
use source::Source;

/// Reads a layer's archive to its very end and writes its image to `out`,
/// which is empty. `received` is how many bytes the archive took compressed,
/// so far or in all. The image's UUID is asked for once the archive is read.
/// On an error `out` holds nothing of use.
///
/// # Errors
/// The archive is none, or beyond `limits`; `out` cannot be written.
pub fn write(
    archive: impl Read,
    limits: &Limits,
    received: Rc<Cell<u64>>,
    out: impl Write + Seek,
    uuid: impl FnOnce() -> io::Result<[u8; 16]>,
) -> Result<Written, Error> {
    let mut archive = Archive::new(Source::new(archive, received));
    let mut builder = Builder::new(out, *limits).map_err(Error::Image)?;
    let mut entries = 0;
    while let Some(member) = archive.next()? {
        entries += 1;
        if entries > limits.max_entries {
            return Err(Error::Limit(LimitError::TooManyEntries {
                limit: limits.max_entries,
            }));
        }
        builder.add(member, &mut archive)?;
    }
    let built = builder.finish(uuid().map_err(Error::Uuid)?)?;
    Ok(Written {
        erofs_len: built.erofs_len,
        entries,
        dropped_xattrs: built.dropped_xattrs,
        opaque_root: built.opaque_root,
    })
}
