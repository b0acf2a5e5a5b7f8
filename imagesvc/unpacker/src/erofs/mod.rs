//! A small writer of EROFS images, as Linux's `fs/erofs/erofs_fs.h` defines
//! them: uncompressed, 4 KiB blocks, one device.
//!
//! [`Writer`] owns the output. File contents go to it block by block while
//! they arrive; the [`Tree`] of names and attributes stays in memory, within
//! [`Budget`], and is written behind the data by [`Writer::finish`]:
//!
//! ```text
//! block 0     superblock at byte 1024
//! block 1..   file data, in order of arrival
//!             blocks of directories and of long symlinks
//!             inodes with their xattrs, chunk maps and inlined tails
//! ```
//!
//! The bytes depend on nothing but the calls made: no clock, no random UUID.
//! [`Reader`] reads directories back. Called by [`crate::layer`], which turns
//! tar streams into trees and looks at what several of them make together.

mod chunk;
mod data;
mod dirent;
mod inode;
mod layout;
mod read;
mod superblock;
mod tree;
mod writer;
mod xattr;

#[cfg(test)]
mod tests;

use std::io;

use unpacker_client::Limits;

pub use data::{Content, FileWriter};
pub use read::{Directory, Entry, Nid, ReadError, Reader};
pub use tree::{Attr, Device, InodeId, Node, Timestamp, Tree};
pub use writer::Writer;
pub use xattr::{XattrError, Xattrs};

/// Size of a block, the unit of data addresses and of an image's length.
pub const BLOCK_SIZE: usize = 4096;

/// Longest name of a directory entry (EROFS_NAME_LEN).
pub const MAX_NAME_LEN: usize = 255;

/// Longest symlink target that Linux can follow: PATH_MAX less its NUL.
pub const MAX_SYMLINK_LEN: usize = 4095;

const BLOCK: u64 = BLOCK_SIZE as u64;

/// What one image may cost.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Length of the image. Addresses are 32 bits of blocks, so never more
    /// than 16 TiB.
    pub max_image_bytes: u64,
    /// Inodes and names that may be held.
    pub max_entries: u64,
    /// Memory for names, attributes, xattrs, chunk maps and tails of files.
    pub max_metadata_bytes: u64,
    /// Part of `max_metadata_bytes` that tails of files may take. Later files
    /// get a block of their own for their tail.
    pub max_tail_bytes: u64,
}

impl From<&Limits> for Budget {
    fn from(limits: &Limits) -> Self {
        Self {
            max_image_bytes: limits.max_uncompressed_bytes,
            max_entries: limits.max_entries,
            max_metadata_bytes: limits.max_metadata_bytes,
            max_tail_bytes: limits.max_tail_bytes,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot write the image")]
    Io(#[from] io::Error),
    #[error("the image would be larger than {limit} bytes")]
    ImageTooLarge { limit: u64 },
    #[error("more than {limit} entries")]
    TooManyEntries { limit: u64 },
    #[error("names and attributes need more than {limit} bytes of memory")]
    MetadataTooLarge { limit: u64 },
    #[error("a file of {expected} bytes was given {given}")]
    WrongSize { expected: u64, given: u64 },
    #[error("inode {0} is not a directory")]
    NotADirectory(u32),
}

/// Bytes of padding that bring `len` to a multiple of `unit`.
const fn padding(len: u64, unit: u64) -> u64 {
    len.next_multiple_of(unit) - len
}
