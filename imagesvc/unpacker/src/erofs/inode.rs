//! Inodes on disk: 32 bytes where everything fits, else 64.

use super::{Attr, Timestamp};

pub(super) const COMPACT_LEN: usize = 32;
pub(super) const EXTENDED_LEN: usize = 64;

/// EROFS_INODE_*: how the content is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Layout {
    FlatPlain = 0,
    FlatInline = 2,
    ChunkBased = 4,
}

/// `st_mode`'s file types.
pub(super) const S_IFIFO: u16 = 0o010_000;
pub(super) const S_IFCHR: u16 = 0o020_000;
pub(super) const S_IFDIR: u16 = 0o040_000;
pub(super) const S_IFBLK: u16 = 0o060_000;
pub(super) const S_IFREG: u16 = 0o100_000;
pub(super) const S_IFLNK: u16 = 0o120_000;
pub(super) const S_IFSOCK: u16 = 0o140_000;

pub(super) struct DiskInode<'a> {
    pub(super) attr: &'a Attr,
    /// One of `S_IF*`.
    pub(super) file_type: u16,
    pub(super) layout: Layout,
    pub(super) size: u64,
    pub(super) nlink: u32,
    /// First block, device number or chunk format.
    pub(super) union: u32,
    /// The number that a 32-bit `stat` shows.
    pub(super) ino: u32,
}

/// Whether a compact inode holds all this; its time is always the epoch.
pub(super) fn fits_compact(attr: &Attr, size: u64, nlink: u32, epoch: Timestamp) -> bool {
    attr.mtime == epoch
        && u16::try_from(attr.uid).is_ok()
        && u16::try_from(attr.gid).is_ok()
        && u16::try_from(nlink).is_ok()
        && u32::try_from(size).is_ok()
}

impl DiskInode<'_> {
    pub(super) fn encode(&self, compact: bool, out: &mut Vec<u8>) {
        let format = ((self.layout as u16) << 1) | u16::from(!compact);
        out.extend(format.to_le_bytes());
        out.extend(self.attr.xattrs.icount().to_le_bytes());
        out.extend((self.file_type | self.attr.mode & 0o7777).to_le_bytes());
        if compact {
            // Narrowed only where `fits_compact` said so.
            out.extend((self.nlink as u16).to_le_bytes());
            out.extend((self.size as u32).to_le_bytes());
            out.extend([0; 4]);
            out.extend(self.union.to_le_bytes());
            out.extend(self.ino.to_le_bytes());
            out.extend((self.attr.uid as u16).to_le_bytes());
            out.extend((self.attr.gid as u16).to_le_bytes());
            out.extend([0; 4]);
        } else {
            out.extend([0; 2]);
            out.extend(self.size.to_le_bytes());
            out.extend(self.union.to_le_bytes());
            out.extend(self.ino.to_le_bytes());
            out.extend(self.attr.uid.to_le_bytes());
            out.extend(self.attr.gid.to_le_bytes());
            out.extend(self.attr.mtime.seconds.to_le_bytes());
            out.extend(self.attr.mtime.nanos.to_le_bytes());
            out.extend(self.nlink.to_le_bytes());
            out.extend([0; 16]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_have_their_length() {
        let attr = Attr::default();
        let inode = DiskInode {
            attr: &attr,
            file_type: S_IFREG,
            layout: Layout::FlatInline,
            size: 7,
            nlink: 1,
            union: 0,
            ino: 1,
        };
        for (compact, len) in [(true, COMPACT_LEN), (false, EXTENDED_LEN)] {
            let mut out = Vec::new();
            inode.encode(compact, &mut out);
            assert_eq!(out.len(), len);
            assert_eq!(out[0], if compact { 4 } else { 5 });
        }
    }

    #[test]
    fn wide_numbers_and_other_times_need_the_long_form() {
        let epoch = Timestamp {
            seconds: 5,
            nanos: 6,
        };
        let fits = |attr: &Attr, size, nlink| fits_compact(attr, size, nlink, epoch);
        let attr = Attr {
            mtime: epoch,
            ..Attr::default()
        };
        assert!(fits(&attr, u64::from(u32::MAX), 65535));
        assert!(!fits(&attr, 1 << 32, 1));
        assert!(!fits(&attr, 0, 65536));
        assert!(!fits(
            &Attr {
                uid: 65536,
                ..attr.clone()
            },
            0,
            1
        ));
        assert!(!fits(
            &Attr {
                gid: 65536,
                ..attr.clone()
            },
            0,
            1
        ));
        assert!(!fits(&Attr::default(), 0, 1));
    }
}
