//! Directory blocks: an array of dirents, then the names they point at.
//!
//! Names are sorted as bytes over the whole directory, `.` and `..` among
//! them: the kernel searches first the blocks and then the dirents by halves.

use super::{BLOCK_SIZE, InodeId, Node, Tree};

const DIRENT_LEN: usize = 12;

/// The names of a directory as they lie on disk.
pub(super) struct Listing<'t> {
    entries: Vec<(&'t [u8], InodeId)>,
    /// Index behind the last entry of each block.
    ends: Vec<usize>,
}

impl<'t> Listing<'t> {
    /// Of `id`, if it is a directory.
    pub(super) fn of(tree: &'t Tree, id: InodeId) -> Option<Self> {
        let Node::Directory {
            children, parent, ..
        } = tree.node(id)
        else {
            return None;
        };
        let mut entries: Vec<(&[u8], InodeId)> = Vec::with_capacity(children.len() + 2);
        entries.extend([(&b"."[..], id), (&b".."[..], *parent)]);
        entries.extend(children.iter().map(|(name, child)| (&name[..], *child)));
        entries.sort_unstable_by_key(|(name, _)| *name);
        let ends = split(entries.iter().map(|(name, _)| name.len()));
        Some(Self { entries, ends })
    }

    pub(super) fn blocks(&self) -> usize {
        self.ends.len()
    }

    /// Length of the directory: its last block counts up to its last name.
    pub(super) fn size(&self) -> usize {
        let last = self.block_entries(self.blocks() - 1);
        (self.blocks() - 1) * BLOCK_SIZE
            + last.iter().map(|(name, _)| cost(name.len())).sum::<usize>()
    }

    fn block_entries(&self, block: usize) -> &[(&'t [u8], InodeId)] {
        let begin = match block {
            0 => 0,
            block => self.ends[block - 1],
        };
        &self.entries[begin..self.ends[block]]
    }

    /// Appends block number `block`, up to its last name.
    pub(super) fn encode(&self, tree: &Tree, nids: &[u64], block: usize, out: &mut Vec<u8>) {
        let entries = self.block_entries(block);
        let mut name_at = entries.len() * DIRENT_LEN;
        for (name, id) in entries {
            out.extend(nids[id.index()].to_le_bytes());
            // Below BLOCK_SIZE.
            out.extend((name_at as u16).to_le_bytes());
            out.extend([file_type(tree.node(*id)), 0]);
            name_at += name.len();
        }
        for (name, _) in entries {
            out.extend(*name);
        }
    }
}

fn cost(name_len: usize) -> usize {
    DIRENT_LEN + name_len
}

/// Fills blocks one after another; gives the index behind each one's last
/// entry.
fn split(name_lens: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut used = 0;
    let mut count = 0;
    for len in name_lens {
        if used + cost(len) > BLOCK_SIZE {
            ends.push(count);
            used = 0;
        }
        used += cost(len);
        count += 1;
    }
    ends.push(count);
    ends
}

/// The kernel's FT_* numbers.
fn file_type(node: &Node) -> u8 {
    match node {
        Node::File(_) => 1,
        Node::Directory { .. } => 2,
        Node::CharDevice(_) => 3,
        Node::BlockDevice(_) => 4,
        Node::Fifo => 5,
        Node::Socket => 6,
        Node::Symlink(_) => 7,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_block_holds_what_fits_and_no_more(
            lens in proptest::collection::vec(1usize..=255, 2..2000)
        ) {
            let ends = split(lens.iter().copied());
            prop_assert_eq!(*ends.last().unwrap(), lens.len());
            let mut begin = 0;
            for (block, end) in ends.iter().enumerate() {
                prop_assert!(*end > begin);
                let used: usize = lens[begin..*end].iter().map(|len| cost(*len)).sum();
                prop_assert!(used <= BLOCK_SIZE);
                if block + 1 < ends.len() {
                    prop_assert!(used + cost(lens[*end]) > BLOCK_SIZE);
                }
                begin = *end;
            }
        }
    }
}
