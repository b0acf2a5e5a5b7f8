//! Reads directories back from images of [`super::Writer`]: names, attributes
//! and extended attributes, not the content of files.
//!
//! The images are the store's own, yet their names and attributes come from
//! strangers and the disk may have bitten: whatever the bytes say, reading
//! ends in an error at worst.

use std::io::{self, Read, Seek, SeekFrom};

use super::inode::{COMPACT_LEN, EXTENDED_LEN, Layout, S_IFDIR};
use super::layout::SLOT;
use super::superblock::Superblock;
use super::{BLOCK, BLOCK_SIZE, Timestamp, xattr};

/// `st_mode`'s file type.
const S_IFMT: u16 = 0o170_000;

/// The kernel's FT_DIR.
const FT_DIRECTORY: u8 = 2;

const DIRENT_LEN: usize = 12;

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("cannot read the image")]
    Io(#[from] io::Error),
    #[error("the image is damaged: {0}")]
    Damaged(&'static str),
}

/// Number of an inode in one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nid(u64);

/// A directory's inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// Permission, set-id and sticky bits (07777).
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    /// Whole names and their values, in the order in which they were written.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    size: u64,
    first_block: u64,
    /// Where the last block lies, if beside the inode.
    tail_at: Option<u64>,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    pub name: &'a [u8],
    pub nid: Nid,
    pub is_directory: bool,
}

pub struct Reader<R> {
    image: R,
    superblock: Superblock,
    /// The block that was read last: inodes and names lie close together.
    block: Vec<u8>,
    block_number: Option<u64>,
}

impl<R: Read + Seek> Reader<R> {
    pub fn open(image: R) -> Result<Self, ReadError> {
        let mut reader = Self {
            image,
            superblock: Superblock::default(),
            block: vec![0; BLOCK_SIZE],
            block_number: None,
        };
        let first = reader.bytes(0, BLOCK_SIZE)?;
        reader.superblock =
            Superblock::decode(&first).ok_or(ReadError::Damaged("it has no superblock"))?;
        Ok(reader)
    }

    pub fn root(&self) -> Nid {
        Nid(u64::from(self.superblock.root_nid))
    }

    pub fn directory(&mut self, nid: Nid) -> Result<Directory, ReadError> {
        let bad = ReadError::Damaged;
        let at = (nid.0.checked_mul(SLOT as u64))
            .and_then(|offset| offset.checked_add(u64::from(self.superblock.meta_block) * BLOCK))
            .ok_or(bad("an inode's number is too high"))?;
        // The longer form may reach beyond the image's end where there is the
        // shorter one.
        let short = Fields(self.bytes(at, COMPACT_LEN)?);
        let format = short.u16(0);
        let compact = format & 1 == 0;
        let inode = if compact {
            short
        } else {
            Fields(self.bytes(at, EXTENDED_LEN)?)
        };
        let mode = inode.u16(4);
        if mode & S_IFMT != S_IFDIR {
            return Err(bad("a directory is none"));
        }
        let xattr_words = usize::from(inode.u16(2));
        let xattr_len = xattr::len_of(xattr_words);
        let len = if compact { COMPACT_LEN } else { EXTENDED_LEN };
        let (size, mtime) = if compact {
            (u64::from(inode.u32(8)), self.superblock.epoch)
        } else {
            let seconds = i64::from_le_bytes(inode.array(32));
            let nanos = inode.u32(40);
            (inode.u64(8), Timestamp { seconds, nanos })
        };
        let (uid, gid) = if compact {
            (u32::from(inode.u16(24)), u32::from(inode.u16(26)))
        } else {
            (inode.u32(24), inode.u32(28))
        };
        let beside = at + len as u64;
        let tail_at = match format >> 1 {
            layout if layout == Layout::FlatPlain as u16 => None,
            layout if layout == Layout::FlatInline as u16 => Some(beside + xattr_len as u64),
            _ => return Err(bad("a directory's layout is not of this writer")),
        };
        let xattrs = self.bytes(beside, xattr_len)?;
        Ok(Directory {
            mode: mode & 0o7777,
            uid,
            gid,
            mtime,
            xattrs: xattr::decode(&xattrs).ok_or(bad("extended attributes are malformed"))?,
            size,
            first_block: u64::from(inode.u32(16)),
            tail_at,
        })
    }

    /// Shows `take` every name of a directory but `.` and `..`.
    pub fn entries(
        &mut self,
        directory: &Directory,
        mut take: impl FnMut(Entry<'_>),
    ) -> Result<(), ReadError> {
        let full = directory.size / BLOCK;
        for number in 0..full {
            let block = self.bytes((directory.first_block + number) * BLOCK, BLOCK_SIZE)?;
            list(&block, &mut take)?;
        }
        let rest = (directory.size % BLOCK) as usize;
        if rest > 0 {
            let at = (directory.tail_at).unwrap_or((directory.first_block + full) * BLOCK);
            let block = self.bytes(at, rest)?;
            list(&block, &mut take)?;
        }
        Ok(())
    }

    /// At most some hundred KiB, by the widths of what asks for them.
    fn bytes(&mut self, mut at: u64, mut len: usize) -> Result<Vec<u8>, ReadError> {
        let mut bytes = Vec::with_capacity(len);
        while len > 0 {
            let number = at / BLOCK;
            if self.block_number != Some(number) {
                self.block_number = None;
                self.image.seek(SeekFrom::Start(number * BLOCK))?;
                self.image.read_exact(&mut self.block)?;
                self.block_number = Some(number);
            }
            let from = (at % BLOCK) as usize;
            let part = len.min(BLOCK_SIZE - from);
            bytes.extend(&self.block[from..from + part]);
            at += part as u64;
            len -= part;
        }
        Ok(bytes)
    }
}

/// The names of one block of a directory.
fn list(block: &[u8], take: &mut impl FnMut(Entry<'_>)) -> Result<(), ReadError> {
    let bad = ReadError::Damaged("a directory's names are malformed");
    // Where the first name begins the entries end.
    let Some(first) = block.get(8..10) else {
        return Err(bad);
    };
    let count = usize::from(u16::from_le_bytes([first[0], first[1]])) / DIRENT_LEN;
    let entries = match block.get(..count * DIRENT_LEN) {
        Some(entries) if count > 0 => entries,
        _ => return Err(bad),
    };
    let mut entries = entries.chunks_exact(DIRENT_LEN).peekable();
    while let Some(entry) = entries.next() {
        let name_at = |entry: &[u8]| usize::from(u16::from_le_bytes([entry[8], entry[9]]));
        let end = entries.peek().map_or(block.len(), |next| name_at(next));
        let Some(name) = block.get(name_at(entry)..end) else {
            return Err(bad);
        };
        // Zeros follow the last name of a block.
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        if name != b"." && name != b".." {
            let fields = Fields(entry.to_vec());
            take(Entry {
                name,
                nid: Nid(fields.u64(0)),
                is_directory: entry[10] == FT_DIRECTORY,
            });
        }
    }
    Ok(())
}

/// Little-endian numbers at offsets that the caller knows are there.
struct Fields(Vec<u8>);

impl Fields {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut array = [0; N];
        array.copy_from_slice(&self.0[at..at + N]);
        array
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;
    use crate::erofs::{Attr, Budget, Node, Tree, Writer, Xattrs};

    const BUDGET: Budget = Budget {
        max_image_bytes: 1 << 30,
        max_entries: 10_000,
        max_metadata_bytes: 16 << 20,
        max_tail_bytes: 1 << 16,
    };

    fn image(tree: &Tree) -> Vec<u8> {
        let writer = Writer::new(Cursor::new(Vec::new()), &BUDGET).unwrap();
        writer.finish(tree, [1; 16]).unwrap().0.into_inner()
    }

    fn names<R: Read + Seek>(reader: &mut Reader<R>, nid: Nid) -> BTreeMap<Vec<u8>, (Nid, bool)> {
        let directory = reader.directory(nid).unwrap();
        let mut names = BTreeMap::new();
        reader
            .entries(&directory, |entry| {
                names.insert(entry.name.to_vec(), (entry.nid, entry.is_directory));
            })
            .unwrap();
        names
    }

    #[test]
    fn attributes_come_back_from_both_forms_of_inodes() {
        let mut xattrs = Xattrs::default();
        for (name, value) in [
            (&b"user.a"[..], &b"1"[..]),
            (b"system.posix_acl_default", b"acl"),
            (b"trusted.overlay.opaque", b"y"),
        ] {
            xattrs.push(name, value).unwrap();
        }
        let wide = Attr {
            mode: 0o1777,
            uid: 100_000,
            gid: 7,
            mtime: Timestamp {
                seconds: -5,
                nanos: 6,
            },
            xattrs,
        };
        let mut tree = Tree::new(Attr::default(), BUDGET);
        tree.insert_directory(Tree::ROOT, b"wide", wide).unwrap();
        tree.insert(Tree::ROOT, b"fifo", Attr::default(), Node::Fifo)
            .unwrap();
        let mut reader = Reader::open(Cursor::new(image(&tree))).unwrap();
        let root = reader.root();
        let found = names(&mut reader, root);
        assert_eq!(found.len(), 2);
        let ((fifo, false), (wide, true)) = (found[&b"fifo"[..]], found[&b"wide"[..]]) else {
            panic!("{found:?}");
        };
        let wide = reader.directory(wide).unwrap();
        assert_eq!((wide.mode, wide.uid, wide.gid), (0o1777, 100_000, 7));
        assert_eq!((wide.mtime.seconds, wide.mtime.nanos), (-5, 6));
        let names: Vec<&[u8]> = wide.xattrs.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(
            names,
            [
                &b"user.a"[..],
                b"system.posix_acl_default",
                b"trusted.overlay.opaque"
            ]
        );
        assert_eq!(wide.xattrs[1].1, b"acl");
        let root = reader.directory(root).unwrap();
        assert_eq!((root.mode, root.uid, root.xattrs.len()), (0, 0, 0));
        assert!(reader.directory(fifo).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn every_name_comes_back(
            names_in in proptest::collection::btree_set("[a-z]{1,200}", 0..300)
        ) {
            let mut tree = Tree::new(Attr::default(), BUDGET);
            for (number, name) in names_in.iter().enumerate() {
                if number % 2 == 0 {
                    tree.insert_directory(Tree::ROOT, name.as_bytes(), Attr::default()).unwrap();
                } else {
                    tree.insert(Tree::ROOT, name.as_bytes(), Attr::default(), Node::Fifo).unwrap();
                }
            }
            let mut reader = Reader::open(Cursor::new(image(&tree))).unwrap();
            let root = reader.root();
            let found = names(&mut reader, root);
            prop_assert_eq!(found.len(), names_in.len());
            for (number, name) in names_in.iter().enumerate() {
                let (nid, is_directory) = found[name.as_bytes()];
                prop_assert_eq!(is_directory, number % 2 == 0);
                prop_assert_eq!(reader.directory(nid).is_ok(), is_directory);
            }
        }

        #[test]
        fn damage_is_an_error_at_worst(
            at in 1024usize..12_288,
            len in 1usize..64,
            byte in any::<u8>(),
        ) {
            let mut tree = Tree::new(Attr::default(), BUDGET);
            for number in 0..200 {
                let name = format!("{number:0>30}");
                tree.insert_directory(Tree::ROOT, name.as_bytes(), Attr::default()).unwrap();
            }
            let mut bytes = image(&tree);
            let end = (at + len).min(bytes.len());
            bytes[at.min(end)..end].fill(byte);
            let Ok(mut reader) = Reader::open(Cursor::new(bytes)) else { return Ok(()); };
            let root = reader.root();
            let Ok(directory) = reader.directory(root) else { return Ok(()); };
            let mut nids = Vec::new();
            if reader.entries(&directory, |entry| nids.push(entry.nid)).is_ok() {
                for nid in nids {
                    let _ = reader.directory(nid);
                }
            }
        }
    }
}
