//! Where inodes lie in the metadata area.
//!
//! An item (an inode with what lies beside it) never crosses the end of a
//! block when it fits in one, because inlined data must not. The room left at
//! a block's end is given to later, smaller items.

use super::BLOCK_SIZE;

/// Inode numbers count slots of this length.
pub(super) const SLOT: usize = 32;

const SLOTS_PER_BLOCK: usize = BLOCK_SIZE / SLOT;

/// The first slots stay empty: readdir(3) of older C libraries takes inode
/// number 0 for a deleted file.
const RESERVED: usize = 2 * SLOT;

#[derive(Debug)]
pub(super) struct Placer {
    /// Behind the last item.
    end: u64,
    /// Starts of unused room, by its length in slots.
    gaps: [Vec<u64>; SLOTS_PER_BLOCK],
}

impl Placer {
    pub(super) fn new() -> Self {
        Self {
            end: RESERVED as u64,
            gaps: std::array::from_fn(|_| Vec::new()),
        }
    }

    /// Gives `len` bytes a place, and the place as an offset.
    pub(super) fn place(&mut self, len: usize) -> u64 {
        let slots = len.div_ceil(SLOT);
        if slots <= SLOTS_PER_BLOCK {
            let gap =
                (slots..SLOTS_PER_BLOCK).find_map(|free| Some((free, self.gaps[free].pop()?)));
            if let Some((free, at)) = gap {
                self.keep_gap(at + (slots * SLOT) as u64, free - slots);
                return at;
            }
        }
        let used = (self.end % BLOCK_SIZE as u64) as usize / SLOT;
        if used > 0 && used + slots > SLOTS_PER_BLOCK {
            let free = SLOTS_PER_BLOCK - used;
            self.keep_gap(self.end, free);
            self.end += (free * SLOT) as u64;
        }
        let at = self.end;
        self.end += (slots * SLOT) as u64;
        at
    }

    fn keep_gap(&mut self, at: u64, slots: usize) {
        if slots > 0 {
            self.gaps[slots].push(at);
        }
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn items_never_overlap_and_small_ones_stay_in_their_block(
            lens in proptest::collection::vec(
                prop_oneof![Just(32usize), Just(64), 65usize..2200, 4000usize..4200, 4096usize..20000],
                1..400,
            )
        ) {
            let mut placer = Placer::new();
            let mut items: Vec<(u64, usize)> =
                lens.iter().map(|len| (placer.place(*len), *len)).collect();
            for (at, len) in &items {
                prop_assert_eq!(at % SLOT as u64, 0);
                prop_assert!(*at >= RESERVED as u64);
                let in_block = *at as usize % BLOCK_SIZE;
                let fits = in_block + len <= BLOCK_SIZE;
                prop_assert!(fits || (*len > BLOCK_SIZE && in_block == 0));
                prop_assert!(at + *len as u64 <= placer.end());
            }
            items.sort_unstable();
            for pair in items.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 as u64 <= pair[1].0);
            }
        }
    }

    #[test]
    fn room_at_the_end_of_a_block_is_used() {
        let mut placer = Placer::new();
        assert_eq!(placer.place(2048), 64);
        assert_eq!(placer.place(2048), 4096);
        assert_eq!(placer.place(64), 64 + 2048);
        assert_eq!(placer.place(2048), 4096 + 2048);
        assert_eq!(placer.place(1920), 64 + 2048 + 64);
        assert_eq!(placer.place(32), 2 * 4096);
    }
}
