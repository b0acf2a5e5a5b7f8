//! What can be wrong with a layer.

use std::io;

use unpacker_client::LimitError;

use super::path::{PathError, show};
use super::pax::PaxError;
use super::sparse::SparseError;
use crate::erofs;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Of the reader, or of its compression.
    #[error("cannot read the layer's archive beyond byte {offset}")]
    Read { offset: u64, source: io::Error },
    #[error("the layer's archive ends too early, at byte {offset}")]
    Truncated { offset: u64 },
    #[error("there is no tar header at byte {offset} of the layer's archive")]
    NotAHeader { offset: u64 },
    #[error("the header at byte {offset} of the layer's archive is longer than {limit} bytes")]
    HeaderTooLong { offset: u64, limit: u64 },
    #[error("the extended header at byte {offset} of the layer's archive is malformed")]
    Pax { offset: u64, source: PaxError },
    #[error("there is data behind the end of the layer's archive, at byte {offset}")]
    TrailingData { offset: u64 },
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error("entry '{path}' of the layer")]
    Entry { path: String, source: EntryError },
    /// Of whoever knows the image's UUID.
    #[error("the layer's image is not to be finished")]
    Uuid(#[source] io::Error),
    #[error("cannot finish the layer's image")]
    Image(#[source] erofs::Error),
    #[error("cannot read a converted layer")]
    Converted(#[source] erofs::ReadError),
}

#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    #[error("its path {0}")]
    Path(PathError),
    #[error("its path goes through '{parent}', which is no directory")]
    ParentNotDirectory { parent: String },
    #[error("its path goes through more than {limit} symbolic links")]
    SymlinkLoop { limit: usize },
    #[error("it lies more than {limit} directories deep")]
    TooDeep { limit: u32 },
    #[error("it is the root but no directory")]
    RootNotDirectory,
    #[error("it is a hard link to '{target}', which {reason}")]
    HardLink {
        target: String,
        reason: HardLinkReason,
    },
    #[error("its symbolic link's target is {0} bytes long: not 1 to {max}", max = erofs::MAX_SYMLINK_LEN)]
    SymlinkTarget(usize),
    #[error("its {0} is malformed or too large")]
    Number(&'static str),
    #[error("its device number {major}:{minor} does not exist in Linux")]
    Device { major: i64, minor: i64 },
    #[error("its type '{0}' is not supported")]
    Type(String),
    #[error("it is {size} bytes long, more than {limit}")]
    TooLong { size: u64, limit: u64 },
    #[error("it is a sparse file: {0}")]
    Sparse(SparseError),
    #[error("its extended attribute '{name}'")]
    Xattr {
        name: String,
        source: erofs::XattrError,
    },
    #[error(transparent)]
    Image(#[from] erofs::Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HardLinkReason {
    #[error("is not in this layer")]
    Absent,
    #[error("is a directory")]
    Directory,
    #[error("points outside the root")]
    OutsideRoot,
    #[error("is no valid path")]
    Malformed,
}

impl EntryError {
    pub(super) fn at(self, path: &[u8]) -> Error {
        Error::Entry {
            path: show(path),
            source: self,
        }
    }
}
