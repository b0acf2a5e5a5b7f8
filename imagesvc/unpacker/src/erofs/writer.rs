//! The image as a whole: data first, metadata behind it, superblock last.

use std::collections::HashMap;
use std::io::{BufWriter, Seek, SeekFrom, Write};

use super::data::Place;
use super::dirent::Listing;
use super::inode::{self, DiskInode, Layout};
use super::layout::{Placer, SLOT};
use super::superblock::Superblock;
use super::tree::Inode;
use super::{
    BLOCK, BLOCK_SIZE, Budget, Error, FileWriter, InodeId, Node, Timestamp, Tree, padding,
};

/// Output is written in pieces of this size.
const BUFFER: usize = 256 * 1024;

/// Addresses are 32 bits of blocks, the highest of which means a hole.
const MAX_IMAGE: u64 = (u32::MAX as u64) * BLOCK;

/// An image being written. What goes wrong leaves the output half written:
/// it is the caller's to throw away.
pub struct Writer<W: Write + Seek> {
    out: BufWriter<W>,
    len: u64,
    max_len: u64,
    tail_room: u64,
}

/// How one inode goes to disk.
struct Plan {
    id: InodeId,
    /// Offset in the metadata area.
    at: u64,
    compact: bool,
    inlined: bool,
    /// First block of a directory or symlink that is not inlined whole.
    block: u32,
}

impl<W: Write + Seek> Writer<W> {
    /// Writes from the start of `out`, which is empty.
    pub fn new(out: W, budget: &Budget) -> Result<Self, Error> {
        let mut writer = Self {
            out: BufWriter::with_capacity(BUFFER, out),
            len: 0,
            max_len: budget.max_image_bytes.min(MAX_IMAGE),
            tail_room: budget.max_tail_bytes,
        };
        writer.append_zeros(BLOCK)?;
        Ok(writer)
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.len
    }

    /// Begins a file of `size` bytes beside whose inode `xattrs_len` bytes of
    /// xattrs will lie.
    pub fn file(&mut self, size: u64, xattrs_len: usize) -> FileWriter<'_, W> {
        FileWriter::new(self, size, xattrs_len)
    }

    /// Writes `tree` and the superblock; gives the output back, and its
    /// length, a multiple of [`BLOCK_SIZE`].
    pub fn finish(mut self, tree: &Tree, uuid: [u8; 16]) -> Result<(W, u64), Error> {
        let (order, links) = walk(tree);
        let epoch = common_time(tree, &order);
        let mut placer = Placer::new();
        let mut nids = vec![0; tree.inode_count()];
        let mut next_block = u64::from(self.next_block());
        let mut chunked_files = false;
        let mut plans: Vec<Plan> = Vec::with_capacity(order.len());
        for id in order {
            let inode = tree.inode(id);
            chunked_files |= is_chunked(inode);
            let size = size(tree, id, inode);
            let compact = inode::fits_compact(&inode.attr, size, links[id.index()], epoch);
            let fixed = inode_len(compact) + inode.attr.xattrs.encoded_len();
            let wanted = beside_len(inode, size);
            let inlined = wanted > 0 && (is_chunked(inode) || fixed + wanted <= BLOCK_SIZE);
            let at = placer.place(fixed + if inlined { wanted } else { 0 });
            nids[id.index()] = at / SLOT as u64;
            let mut plan = Plan {
                id,
                at,
                compact,
                inlined,
                block: 0,
            };
            if matches!(inode.node, Node::Directory { .. } | Node::Symlink(_)) {
                let blocks = if inlined {
                    size / BLOCK
                } else {
                    size.div_ceil(BLOCK)
                };
                if blocks > 0 {
                    plan.block = self.block_number(next_block)?;
                    next_block += blocks;
                }
            }
            plans.push(plan);
        }
        let meta_block = self.block_number(next_block)?;
        self.append_blocks(tree, &plans, &nids)?;
        let root_nid = nids[Tree::ROOT.index()] as u16;
        let inodes = plans.len() as u64;
        self.append_inodes(tree, plans, &links, &nids)?;
        let superblock = Superblock {
            // The root was placed first, in the first block or the second.
            root_nid,
            inodes,
            epoch,
            blocks: self.next_block(),
            meta_block,
            uuid,
            chunked_files,
        };
        debug_assert!(self.len >= u64::from(meta_block) * BLOCK + placer.end());
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&superblock.encode())?;
        let out = self.out.into_inner().map_err(|err| err.into_error())?;
        Ok((out, self.len))
    }

    /// The blocks of directories and of symlinks that do not lie beside their
    /// inodes.
    fn append_blocks(&mut self, tree: &Tree, plans: &[Plan], nids: &[u64]) -> Result<(), Error> {
        let mut block = Vec::with_capacity(BLOCK_SIZE);
        for plan in plans {
            if let Some(listing) = Listing::of(tree, plan.id) {
                for number in 0..listing.blocks() - usize::from(plan.inlined) {
                    block.clear();
                    listing.encode(tree, nids, number, &mut block);
                    self.append_padded(&block)?;
                }
            } else if let Node::Symlink(target) = tree.node(plan.id)
                && !plan.inlined
            {
                self.append_padded(target)?;
            }
        }
        Ok(())
    }

    fn append_inodes(
        &mut self,
        tree: &Tree,
        mut plans: Vec<Plan>,
        links: &[u32],
        nids: &[u64],
    ) -> Result<(), Error> {
        let start = self.len;
        let mut item = Vec::with_capacity(BLOCK_SIZE);
        plans.sort_unstable_by_key(|plan| plan.at);
        for (number, plan) in plans.iter().enumerate() {
            self.append_zeros(start + plan.at - self.len)?;
            item.clear();
            // Below MAX entries, which is below 32 bits.
            let ino = number as u32 + 1;
            encode(tree, plan, links[plan.id.index()], ino, nids, &mut item);
            self.append(&item)?;
        }
        self.append_zeros(padding(self.len, BLOCK))
    }

    pub(super) fn next_block(&self) -> u32 {
        debug_assert!(self.len.is_multiple_of(BLOCK));
        // Below MAX_IMAGE.
        (self.len / BLOCK) as u32
    }

    fn block_number(&self, block: u64) -> Result<u32, Error> {
        if block * BLOCK > self.max_len {
            return Err(Error::ImageTooLarge {
                limit: self.max_len,
            });
        }
        Ok(block as u32)
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.account(bytes.len() as u64)?;
        Ok(self.out.write_all(bytes)?)
    }

    pub(super) fn append_zeros(&mut self, mut len: u64) -> Result<(), Error> {
        static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
        self.account(len)?;
        while len > 0 {
            let part = len.min(ZEROS.len() as u64);
            self.out.write_all(&ZEROS[..part as usize])?;
            len -= part;
        }
        Ok(())
    }

    fn append_padded(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.append(bytes)?;
        self.append_zeros(padding(bytes.len() as u64, BLOCK))
    }

    fn account(&mut self, len: u64) -> Result<(), Error> {
        let whole = (self.len + len).next_multiple_of(BLOCK);
        if whole > self.max_len {
            return Err(Error::ImageTooLarge {
                limit: self.max_len,
            });
        }
        self.len += len;
        Ok(())
    }

    /// Whether `len` more bytes of tail may stay in memory.
    pub(super) fn reserve_tail(&mut self, len: u64) -> bool {
        let fits = len <= self.tail_room;
        if fits {
            self.tail_room -= len;
        }
        fits
    }

    pub(super) fn release_tail(&mut self, len: u64) {
        self.tail_room += len;
    }
}

/// Every inode that has a name, the children of a directory side by side, and
/// how many links each has.
fn walk(tree: &Tree) -> (Vec<InodeId>, Vec<u32>) {
    let mut links = vec![0u32; tree.inode_count()];
    let mut order = vec![Tree::ROOT];
    let mut open = vec![Tree::ROOT];
    links[Tree::ROOT.index()] = 2;
    while let Some(directory) = open.pop() {
        let Node::Directory { children, .. } = tree.node(directory) else {
            continue;
        };
        let first = open.len();
        for child in children.values() {
            if matches!(tree.node(*child), Node::Directory { .. }) {
                links[directory.index()] += 1;
                links[child.index()] = 2;
                open.push(*child);
                order.push(*child);
            } else {
                links[child.index()] += 1;
                if links[child.index()] == 1 {
                    order.push(*child);
                }
            }
        }
        open[first..].reverse();
    }
    (order, links)
}

/// The time that most inodes have, the earliest of several.
fn common_time(tree: &Tree, order: &[InodeId]) -> Timestamp {
    let mut counts: HashMap<Timestamp, usize> = HashMap::new();
    for id in order {
        *counts.entry(tree.attr(*id).mtime).or_default() += 1;
    }
    counts
        .into_iter()
        .max_by_key(|(time, count)| (*count, std::cmp::Reverse(*time)))
        .map(|(time, _)| time)
        .unwrap_or_default()
}

fn inode_len(compact: bool) -> usize {
    if compact {
        inode::COMPACT_LEN
    } else {
        inode::EXTENDED_LEN
    }
}

fn size(tree: &Tree, id: InodeId, inode: &Inode) -> u64 {
    match &inode.node {
        Node::Directory { .. } => Listing::of(tree, id).map_or(0, |listing| listing.size() as u64),
        Node::File(content) => content.size,
        Node::Symlink(target) => target.len() as u64,
        _ => 0,
    }
}

fn is_chunked(inode: &Inode) -> bool {
    matches!(&inode.node, Node::File(content) if matches!(content.place, Place::Chunks(_)))
}

/// Bytes that would lie beside the inode, if there is room.
fn beside_len(inode: &Inode, size: u64) -> usize {
    match &inode.node {
        Node::Directory { .. } => (size % BLOCK) as usize,
        Node::Symlink(target) => target.len(),
        Node::File(content) => match &content.place {
            Place::Flat { tail, .. } => tail.len(),
            Place::Chunks(map) => map.encoded_len(),
        },
        _ => 0,
    }
}

fn encode(tree: &Tree, plan: &Plan, nlink: u32, ino: u32, nids: &[u64], out: &mut Vec<u8>) {
    let inode = tree.inode(plan.id);
    let flat = if plan.inlined {
        Layout::FlatInline
    } else {
        Layout::FlatPlain
    };
    let (file_type, layout, union) = match &inode.node {
        Node::Directory { .. } => (inode::S_IFDIR, flat, plan.block),
        Node::Symlink(_) => (inode::S_IFLNK, flat, plan.block),
        Node::File(content) => match &content.place {
            Place::Flat { start, .. } => (inode::S_IFREG, flat, *start),
            Place::Chunks(map) => (inode::S_IFREG, Layout::ChunkBased, map.format()),
        },
        Node::CharDevice(device) => (inode::S_IFCHR, Layout::FlatPlain, device.encoded()),
        Node::BlockDevice(device) => (inode::S_IFBLK, Layout::FlatPlain, device.encoded()),
        Node::Fifo => (inode::S_IFIFO, Layout::FlatPlain, 0),
        Node::Socket => (inode::S_IFSOCK, Layout::FlatPlain, 0),
    };
    let listing = Listing::of(tree, plan.id);
    let disk = DiskInode {
        attr: &inode.attr,
        file_type,
        layout,
        size: match &listing {
            Some(listing) => listing.size() as u64,
            None => size(tree, plan.id, inode),
        },
        nlink,
        union,
        ino,
    };
    disk.encode(plan.compact, out);
    inode.attr.xattrs.encode(out);
    if !plan.inlined {
        return;
    }
    match (&inode.node, listing) {
        (_, Some(listing)) => listing.encode(tree, nids, listing.blocks() - 1, out),
        (Node::Symlink(target), _) => out.extend(target),
        (Node::File(content), _) => match &content.place {
            Place::Flat { tail, .. } => out.extend(tail),
            Place::Chunks(map) => map.encode(out),
        },
        _ => {}
    }
}
