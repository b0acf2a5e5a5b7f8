//! The messages. The daemon sends an [`Order`] with descriptors beside it, and
//! to an unpacker that writes, at the end, the 16 bytes of its image's UUID.
//! The unpacker answers with one [`Word`] once it is in its jail, and one when
//! it is done.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Limits;

/// Longest message, either way. What an unpacker says is not trusted with
/// more.
pub(crate) const MAX_MESSAGE: usize = 16 * 1024;

/// Descriptors beside an order: an image of as many layers as the image
/// service takes, the file to write, and some room.
pub const MAX_FDS: usize = 160;

/// What is kept of an unpacker's reason for a failure.
pub const MAX_REASON_CHARS: usize = 2000;

/// What one unpacker is to do, and as whom.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// Nobody else's on the node, and not root's.
    pub uid: u32,
    pub gid: u32,
    /// Whether to refuse the work where the node's kernel lacks a part of the
    /// jail.
    pub strict: bool,
    pub bounds: Bounds,
    pub task: Task,
}

/// What the kernel lets an unpacker take.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Bounds {
    /// Of address space, its program included.
    pub memory_bytes: u64,
    /// Of one file.
    pub file_bytes: u64,
    pub cpu_seconds: u64,
}

/// The descriptors that belong to each stand in their order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Task {
    /// A pipe with a layer's bytes, and one that takes its archive.
    Decompress {
        /// What the media type says; the first bytes overrule it.
        declared: Compression,
        /// Of the archive.
        max_bytes: u64,
    },
    /// A pipe with an archive, and the empty file that becomes its image.
    Write {
        limits: Limits,
        /// Length of the layer before it was decompressed.
        received: u64,
    },
    /// The empty file that becomes the image of what goes on top of layers,
    /// and the images of those, lowest first.
    Directories { limits: Limits, uuid: [u8; 16] },
}

/// How a layer's archive is compressed, by its media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

/// What an unpacker says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Word {
    /// It is in its jail. `missing` is what the node's kernel lacks for it.
    Ready {
        missing: Vec<Missing>,
    },
    Done(Done),
    Failed {
        fault: Fault,
        reason: String,
    },
    /// Nobody takes what it makes any more; whoever should have knows why.
    Unread,
}

/// Parts of the jail that not every kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Missing {
    Seccomp,
    /// All of it.
    Landlock,
    /// Some of what Linux 6.12 has.
    PartOfLandlock,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Seccomp => "seccomp",
            Self::Landlock => "Landlock",
            Self::PartOfLandlock => "a part of Landlock",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Done {
    Decompressed,
    Written(Written),
    /// Length of the image; None if the layers need nothing on top.
    Directories(Option<u64>),
}

/// An archive that has become an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Length of the image, a multiple of its block size.
    pub erofs_len: u64,
    /// Members of the archive.
    pub entries: u64,
    /// Extended attributes that were left out: overlayfs's own, and those of
    /// namespaces that Linux's EROFS has not.
    pub dropped_xattrs: u64,
    /// The root is opaque: no lower layer shows through. overlayfs does not
    /// look at the attribute there, so the layers below must not be stacked.
    pub opaque_root: bool,
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// The layer is none.
    Layer,
    /// The layer is beyond its limits, or the disk is full.
    Resources,
    /// The node's own, such as an I/O error.
    Node,
    /// The node's kernel's, which lacks a part of the jail ([`Order::strict`]).
    Unconfined,
}

impl Task {
    /// It stands in the list of processes.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Decompress { .. } => "decompress",
            Self::Write { .. } => "write",
            Self::Directories { .. } => "directories",
        }
    }

    /// More than any layer within its limits needs, by what was measured.
    pub(crate) fn bounds(&self) -> Bounds {
        const MIB: u64 = 1 << 20;
        /// The program, its stack and its buffers.
        const PROGRAM: u64 = 64 * MIB;
        /// Of what counts as metadata while it is held in maps and made into
        /// an image. Directories of one name each take most.
        const METADATA: u64 = 4;
        /// The largest zstd window that is taken, and its decoder's buffers.
        const WINDOW: u64 = 192 * MIB;
        // Far below any CPU: what is beyond does not end by itself.
        const BYTES_A_SECOND: u64 = 2 * MIB;
        const START_SECONDS: u64 = 120;
        let seconds = |bytes: u64| START_SECONDS + bytes / BYTES_A_SECOND;
        match self {
            Self::Decompress { max_bytes, .. } => Bounds {
                memory_bytes: PROGRAM + WINDOW,
                // Pipes are none.
                file_bytes: 0,
                cpu_seconds: seconds(*max_bytes),
            },
            Self::Write { limits, received } => Bounds {
                memory_bytes: PROGRAM + METADATA * limits.max_metadata_bytes,
                file_bytes: limits.image_bytes(*received),
                cpu_seconds: seconds(limits.max_uncompressed_bytes),
            },
            Self::Directories { limits, .. } => Bounds {
                // Names of all layers, too, are counted as one layer's entries.
                memory_bytes: PROGRAM + METADATA * limits.max_metadata_bytes,
                file_bytes: 2 * limits.max_metadata_bytes,
                cpu_seconds: seconds(limits.max_uncompressed_bytes),
            },
        }
    }
}

/// A file system's UUID (RFC 9562, version 8), made of a digest. overlayfs
/// wants its layers to have one each, else it does without features that need
/// file handles.
#[must_use]
pub fn image_uuid(digest: &[u8; 32]) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// Text of an unpacker as it may be shown: on one line, and not too long.
#[must_use]
pub fn plain(text: &str) -> String {
    text.trim()
        .chars()
        .take(MAX_REASON_CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
