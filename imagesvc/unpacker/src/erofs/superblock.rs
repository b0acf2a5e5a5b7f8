//! The superblock, at byte 1024 of block 0.

use super::{BLOCK_SIZE, Timestamp};

const OFFSET: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS: u8 = BLOCK_SIZE.trailing_zeros() as u8;

/// EROFS_FEATURE_COMPAT_SB_CHKSUM | EROFS_FEATURE_COMPAT_MTIME.
const FEATURE_COMPAT: u32 = 0x1 | 0x2;
const FEATURE_INCOMPAT_CHUNKED_FILE: u32 = 0x4;

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Superblock {
    /// Inode number of the root.
    pub(super) root_nid: u16,
    pub(super) inodes: u64,
    /// The time of every compact inode.
    pub(super) epoch: Timestamp,
    pub(super) blocks: u32,
    /// Block from which inode numbers count, in units of 32 bytes.
    pub(super) meta_block: u32,
    pub(super) uuid: [u8; 16],
    pub(super) chunked_files: bool,
}

impl Superblock {
    /// Block 0.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; OFFSET];
        block.extend(MAGIC.to_le_bytes());
        let checksum_at = block.len();
        block.extend([0; 4]);
        block.extend(FEATURE_COMPAT.to_le_bytes());
        block.extend([BLOCK_BITS, 0]);
        block.extend(self.root_nid.to_le_bytes());
        block.extend(self.inodes.to_le_bytes());
        block.extend(self.epoch.seconds.to_le_bytes());
        block.extend(self.epoch.nanos.to_le_bytes());
        block.extend(self.blocks.to_le_bytes());
        block.extend(self.meta_block.to_le_bytes());
        // xattr_blkaddr: there are no shared xattrs.
        block.extend([0; 4]);
        block.extend(self.uuid);
        // volume_name
        block.extend([0; 16]);
        let incompat = if self.chunked_files {
            FEATURE_INCOMPAT_CHUNKED_FILE
        } else {
            0
        };
        block.extend(incompat.to_le_bytes());
        block.resize(BLOCK_SIZE, 0);
        let checksum = crc32c(&block[OFFSET..]);
        block[checksum_at..checksum_at + 4].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    /// None: this is not block 0 as [`Self::encode`] writes it.
    pub(super) fn decode(block: &[u8]) -> Option<Self> {
        let at = |offset: usize| block.get(OFFSET + offset..);
        let u32_at = |offset| Some(u32::from_le_bytes(*at(offset)?.first_chunk()?));
        let superblock = Self {
            root_nid: u16::from_le_bytes(*at(14)?.first_chunk()?),
            inodes: u64::from_le_bytes(*at(16)?.first_chunk()?),
            epoch: Timestamp {
                seconds: i64::from_le_bytes(*at(24)?.first_chunk()?),
                nanos: u32_at(32)?,
            },
            blocks: u32_at(36)?,
            meta_block: u32_at(40)?,
            uuid: *at(48)?.first_chunk()?,
            chunked_files: u32_at(80)? == FEATURE_INCOMPAT_CHUNKED_FILE,
        };
        (superblock.encode() == block).then_some(superblock)
    }
}

/// CRC-32C as the kernel's `crc32c(~0, ..)`: not inverted at the end. Bit by
/// bit, since it sees 3 KiB of each image.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_decoded_is_what_was_encoded() {
        let superblock = Superblock {
            root_nid: 2,
            inodes: 3,
            epoch: Timestamp {
                seconds: -4,
                nanos: 5,
            },
            blocks: 6,
            meta_block: 7,
            uuid: [8; 16],
            chunked_files: true,
        };
        let mut block = superblock.encode();
        assert_eq!(Superblock::decode(&block), Some(superblock));
        block[OFFSET + 16] ^= 1;
        assert_eq!(Superblock::decode(&block), None);
        assert_eq!(Superblock::decode(&[]), None);
    }

    #[test]
    fn checksum_is_crc32c_without_the_last_inversion() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
        // The kernel starts with this value behind the magic and an empty
        // checksum field.
        assert_eq!(crc32c(&[0xe2, 0xe1, 0xf5, 0xe0, 0, 0, 0, 0]), 0x5045_b54a);
    }
}
