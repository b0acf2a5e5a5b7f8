//! What one layer may cost. An image is hostile input: each number here
//! bounds what its author can make a node spend.

use serde::{Deserialize, Serialize};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Length of the archive once decompressed, and of the image made of it.
    pub max_uncompressed_bytes: u64,
    /// Decompressed bytes, or bytes of the image, for each byte received...
    pub max_ratio: u64,
    /// ...which matters only beyond this many bytes.
    pub ratio_floor_bytes: u64,
    /// Members of the archive, and inodes and names made of them.
    pub max_entries: u64,
    /// Length of one file, holes included.
    pub max_file_bytes: u64,
    /// Memory for names, attributes, xattrs and small tails of files.
    pub max_metadata_bytes: u64,
    /// The part of it for tails of files.
    pub max_tail_bytes: u64,
}

impl Limits {
    /// Model images have layers of tens of GiB; few are beyond this.
    pub const DEFAULT_MAX_UNCOMPRESSED_BYTES: u64 = 64 * GIB;
    /// Program text compresses 3 to 10 times, sparse logs and databases more.
    pub const DEFAULT_MAX_RATIO: u64 = 200;
    /// A bomb of this size does no more harm than an honest layer.
    pub const DEFAULT_RATIO_FLOOR_BYTES: u64 = 2 * GIB;
    /// The largest layers seen in public have about half of that.
    pub const DEFAULT_MAX_ENTRIES: u64 = 1 << 20;
    /// What ext4, on which a copy in the writable layer lands, takes.
    pub const DEFAULT_MAX_FILE_BYTES: u64 = 16 * 1024 * GIB;
    /// 256 bytes for each of the default number of entries.
    pub const DEFAULT_MAX_METADATA_BYTES: u64 = 256 * MIB;
    /// 32 thousand tails of 1 KiB.
    pub const DEFAULT_MAX_TAIL_BYTES: u64 = 32 * MIB;

    /// Length that the image of a layer of `received` bytes can have: its data
    /// within the ratio, and what describes it.
    #[must_use]
    pub fn image_bytes(&self, received: u64) -> u64 {
        let data = received
            .saturating_mul(self.max_ratio)
            .max(self.ratio_floor_bytes);
        let described = self.max_metadata_bytes.saturating_mul(2);
        data.saturating_add(described)
            .min(self.max_uncompressed_bytes)
    }

    /// Whether `produced` bytes out of `received` are within bounds.
    ///
    /// # Errors
    /// They are not.
    pub fn check(&self, received: u64, produced: u64) -> Result<(), LimitError> {
        if produced > self.max_uncompressed_bytes {
            return Err(LimitError::TooLarge {
                limit: self.max_uncompressed_bytes,
            });
        }
        if produced > self.ratio_floor_bytes && produced / received.max(1) >= self.max_ratio {
            return Err(LimitError::Bomb {
                received,
                produced,
                ratio: self.max_ratio,
            });
        }
        Ok(())
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_uncompressed_bytes: Self::DEFAULT_MAX_UNCOMPRESSED_BYTES,
            max_ratio: Self::DEFAULT_MAX_RATIO,
            ratio_floor_bytes: Self::DEFAULT_RATIO_FLOOR_BYTES,
            max_entries: Self::DEFAULT_MAX_ENTRIES,
            max_file_bytes: Self::DEFAULT_MAX_FILE_BYTES,
            max_metadata_bytes: Self::DEFAULT_MAX_METADATA_BYTES,
            max_tail_bytes: Self::DEFAULT_MAX_TAIL_BYTES,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    #[error("the layer is larger than {limit} bytes uncompressed")]
    TooLarge { limit: u64 },
    #[error(
        "{received} bytes of layer become {produced}: more than {ratio} for 1, a decompression bomb"
    )]
    Bomb {
        received: u64,
        produced: u64,
        ratio: u64,
    },
    #[error("the layer has more than {limit} entries")]
    TooManyEntries { limit: u64 },
    #[error("the image's layers have more than {limit} directories that no archive describes")]
    TooManyImplied { limit: u64 },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_matters_beyond_the_floor_only() {
        let limits = Limits {
            max_uncompressed_bytes: 1000,
            max_ratio: 10,
            ratio_floor_bytes: 100,
            ..Limits::default()
        };
        assert_eq!(limits.check(1, 100), Ok(()));
        assert!(matches!(limits.check(1, 101), Err(LimitError::Bomb { .. })));
        assert_eq!(limits.check(11, 109), Ok(()));
        assert_eq!(limits.check(200, 1000), Ok(()));
        assert_eq!(
            limits.check(1000, 1001),
            Err(LimitError::TooLarge { limit: 1000 })
        );
    }
}
