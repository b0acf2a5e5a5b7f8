//! Layers become images: a tar stream in, an EROFS file system out.
//!
//! [`convert`] reads a layer as the registry sent it (OCI image spec, "Image
//! Layer Filesystem Changeset"), decompresses it, and writes the image as it
//! goes: file data is neither kept in memory nor written twice. It is
//! synchronous; the store runs it in a blocking thread and feeds it from the
//! network.
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
mod error;
mod header;
mod inherit;
mod limits;
mod mark;
mod path;
mod pax;
mod resolve;
mod source;
mod sparse;

#[cfg(test)]
mod tests;

use std::io::{Read, Seek, Write};

pub use error::{EntryError, Error, HardLinkReason};
pub(crate) use inherit::Restored;
pub use limits::{LimitError, Limits};
pub use path::PathError;
pub use pax::PaxError;
pub use source::Compression;
pub use sparse::SparseError;

use archive::{Archive, read_error};
use build::Builder;
use source::Source;

/// A layer that was converted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Length of the image, a multiple of [`crate::erofs::BLOCK_SIZE`].
    pub erofs_len: u64,
    /// SHA-256 of the uncompressed archive: the layer's DiffID.
    pub diff_id: [u8; 32],
    pub uncompressed_len: u64,
    /// Members of the archive.
    pub entries: u64,
    /// Extended attributes that were left out: overlayfs's own, and those of
    /// namespaces that Linux's EROFS has not.
    pub dropped_xattrs: u64,
    /// The root is opaque: no lower layer shows through. overlayfs does not
    /// look at the attribute there, so the layers below must not be stacked.
    pub opaque_root: bool,
}

/// Reads a layer's archive from `reader`, to its very end, and writes its
/// image to `out`, which is empty. `declared` is what the media type says;
/// the first bytes overrule it. On an error `out` holds nothing of use.
pub fn convert(
    reader: impl Read,
    declared: Compression,
    limits: &Limits,
    out: impl Write + Seek,
) -> Result<Converted, Error> {
    let source = Source::new(reader, declared, *limits).map_err(|err| read_error(0, err))?;
    let mut archive = Archive::new(source);
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
    let summary = archive.finish();
    let built = builder.finish(uuid(&summary.diff_id))?;
    Ok(Converted {
        erofs_len: built.erofs_len,
        diff_id: summary.diff_id,
        uncompressed_len: summary.uncompressed_len,
        entries,
        dropped_xattrs: built.dropped_xattrs,
        opaque_root: built.opaque_root,
    })
}

/// The file system's UUID (RFC 9562, version 8). overlayfs wants its layers to
/// have one each, else it does without features that need file handles.
fn uuid(diff_id: &[u8; 32]) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&diff_id[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}
