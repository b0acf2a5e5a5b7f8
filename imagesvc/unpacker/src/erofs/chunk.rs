//! Which chunks of a file hold data, for EROFS's chunk-based layout: an array
//! of block addresses, one a chunk, where -1 is a hole.

use super::{BLOCK, BLOCK_SIZE};

/// Smallest chunk, in blocks: 64 KiB. A smaller hole saves too little to pay
/// for a map.
const MIN_CHUNK_BITS: u8 = 4;

/// Chunks in a file's map: 1 MiB of addresses. A larger file gets larger
/// chunks.
const MAX_CHUNKS: u64 = 256 * 1024;

/// By the 5 bits of `EROFS_CHUNK_FORMAT_BLKBITS_MASK`.
const MAX_CHUNK_BITS: u8 = 31;

const HOLE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// First block, or [`HOLE`].
    start: u32,
    chunks: u32,
}

/// The chunks of one file from its start, as runs of neighbours.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ChunkMap {
    bits: u8,
    runs: Vec<Run>,
}

impl ChunkMap {
    pub(super) fn for_size(size: u64) -> Self {
        let blocks = size.div_ceil(BLOCK);
        let mut bits = MIN_CHUNK_BITS;
        while bits < MAX_CHUNK_BITS && blocks.div_ceil(1 << bits) > MAX_CHUNKS {
            bits += 1;
        }
        Self {
            bits,
            runs: Vec::new(),
        }
    }

    pub(super) fn chunk_bytes(&self) -> u64 {
        BLOCK << self.bits
    }

    pub(super) fn push_holes(&mut self, chunks: u64) {
        self.push(HOLE, chunks);
    }

    pub(super) fn push_data(&mut self, start: u32, chunks: u64) {
        self.push(start, chunks);
    }

    fn push(&mut self, start: u32, chunks: u64) {
        // At most 2^21 in all: 64 bits of bytes in chunks of 2^43.
        let chunks = chunks as u32;
        if chunks == 0 {
            return;
        }
        if let Some(last) = self.runs.last_mut() {
            let follows = if last.start == HOLE {
                start == HOLE
            } else {
                let end = u64::from(last.start) + (u64::from(last.chunks) << self.bits);
                end == u64::from(start) && start != HOLE
            };
            if follows {
                last.chunks += chunks;
                return;
            }
        }
        self.runs.push(Run { start, chunks });
    }

    pub(super) fn has_holes(&self) -> bool {
        self.runs.iter().any(|run| run.start == HOLE)
    }

    /// The first block of a file without holes; None: no chunk at all.
    pub(super) fn first_block(&self) -> Option<u32> {
        self.runs.first().map(|run| run.start)
    }

    pub(super) fn shrink(&mut self) {
        self.runs.shrink_to_fit();
    }

    pub(super) fn memory(&self) -> usize {
        self.runs.capacity() * size_of::<Run>()
    }

    /// `i_u.c.format`: the chunk's size over a block's, no index entries.
    pub(super) fn format(&self) -> u32 {
        u32::from(self.bits)
    }

    pub(super) fn encoded_len(&self) -> usize {
        self.runs.iter().map(|run| run.chunks as usize * 4).sum()
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        for run in &self.runs {
            for chunk in 0..run.chunks {
                let block = match run.start {
                    HOLE => HOLE,
                    start => start + (chunk << self.bits),
                };
                out.extend(block.to_le_bytes());
            }
        }
    }
}

/// Whether all of `bytes` are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
    // Comparing slices is memcmp.
    bytes
        .chunks(BLOCK_SIZE)
        .all(|part| part == &ZEROS[..part.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_neighbours_and_writes_an_address_a_chunk() {
        let mut map = ChunkMap::for_size(1 << 20);
        map.push_data(10, 1);
        map.push_data(26, 2);
        map.push_holes(1);
        map.push_holes(2);
        map.push_data(58, 1);
        assert_eq!(map.runs.len(), 3);
        assert!(map.has_holes());
        let mut out = Vec::new();
        map.encode(&mut out);
        assert_eq!(out.len(), map.encoded_len());
        let addresses: Vec<u32> = out
            .chunks(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(addresses, [10, 26, 42, HOLE, HOLE, HOLE, 58]);
    }

    #[test]
    fn huge_files_get_huge_chunks() {
        assert_eq!(ChunkMap::for_size(1).bits, MIN_CHUNK_BITS);
        assert_eq!(ChunkMap::for_size(16 << 30).bits, 4);
        assert_eq!(ChunkMap::for_size((16 << 30) + 1).bits, 5);
        assert_eq!(ChunkMap::for_size(1 << 44).bits, 14);
        assert_eq!(ChunkMap::for_size(u64::MAX).bits, MAX_CHUNK_BITS);
    }
}
