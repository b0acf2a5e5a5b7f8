//! A tar archive as a stream of members.
//!
//! The `tar` crate gives the header's fields. Its own iterator is not used:
//! it splits PAX records at newlines, which values may contain, and holds
//! long names of any length in memory.
//!
//! Where archivers differ, this reads as Go's archive/tar does, with which
//! images are made and unpacked nearly everywhere: links, devices and
//! directories have no data whatever their size says, and global headers are
//! ignored.

use std::io::Read;

use tar::Header;

use super::error::{EntryError, Error};
use super::header::{self, BLOCK, number};
use super::pax::Pax;
use super::source::Source;
use super::sparse::{Extent, PaxForm, pax_form};
use crate::erofs::Timestamp;

/// Longest extended header, as in Go's archive/tar.
const MAX_EXTENSION: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One member. A file's data follows by [`Archive::fill_data`].
#[derive(Debug)]
pub(super) struct Member {
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    /// Target of a hard or symbolic link.
    pub(super) link: Vec<u8>,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) device: (i64, i64),
    /// Length of a file, its holes included.
    pub(super) size: u64,
    /// The parts that are stored: all of it in most files.
    pub(super) extents: Vec<Extent>,
}

pub(super) struct Archive<R: Read> {
    source: Source<R>,
    /// Bytes of the present member's data not yet taken.
    data_left: u64,
    /// Bytes between them and the next header.
    padding: u64,
}

/// What the headers before a member's own say of it.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Pax,
    any: bool,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(source: Source<R>) -> Self {
        Self {
            source,
            data_left: 0,
            padding: 0,
        }
    }

    pub(super) fn received(&self) -> u64 {
        self.source.received()
    }

    /// The next member; None once the archive was read to its very end.
    pub(super) fn next(&mut self) -> Result<Option<Member>, Error> {
        let mut extensions = Extensions::default();
        loop {
            self.skip_rest()?;
            let offset = self.source.offset();
            let mut block = [0; BLOCK];
            let len = self.read(&mut block)?;
            // Some archivers leave out the end mark.
            if len == 0 || block == [0; BLOCK] {
                if extensions.any || (len > 0 && len < BLOCK) {
                    return Err(Error::Truncated { offset });
                }
                self.expect_zeros()?;
                return Ok(None);
            }
            if len < BLOCK {
                return Err(Error::Truncated { offset });
            }
            let header = header::parse(&block).ok_or(Error::NotAHeader { offset })?;
            match header.entry_type().as_byte() {
                b'x' => {
                    let records = self.extension(header)?;
                    extensions.pax =
                        Pax::parse(&records).map_err(|source| Error::Pax { offset, source })?;
                }
                b'L' => extensions.path = Some(c_string(self.extension(header)?)),
                b'K' => extensions.link = Some(c_string(self.extension(header)?)),
                b'g' => {
                    self.extension(header)?;
                    continue;
                }
                _ => return self.member(header, extensions).map(Some),
            }
            extensions.any = true;
        }
    }

    fn member(&mut self, header: &Header, extensions: Extensions) -> Result<Member, Error> {
        let Extensions {
            path, link, pax, ..
        } = extensions;
        let path = pax
            .sparse
            .name
            .clone()
            .or(path)
            .or(pax.path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = link.or(pax.linkpath).unwrap_or_else(|| {
            header
                .link_name_bytes()
                .map_or_else(Vec::new, |link| link.into_owned())
        });
        let fail = |field| EntryError::Number(field).at(&path);
        let old = header.as_old();
        let kind = kind(header, &path)?;
        let id = |pax: Option<u64>, field: &[u8]| {
            let id = match pax {
                Some(id) => u32::try_from(id).ok(),
                None => number(field).and_then(|id| u32::try_from(id).ok()),
            };
            // The highest means "no user" to Linux.
            id.filter(|id| *id != u32::MAX)
        };
        let mode = number(&old.mode).ok_or_else(|| fail("mode"))?;
        let uid = id(pax.uid, &old.uid).ok_or_else(|| fail("user id"))?;
        let gid = id(pax.gid, &old.gid).ok_or_else(|| fail("group id"))?;
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => Timestamp {
                seconds: number(&old.mtime).ok_or_else(|| fail("modification time"))?,
                nanos: 0,
            },
        };
        let device = match kind {
            Kind::CharDevice | Kind::BlockDevice => {
                device(header).ok_or_else(|| fail("device number"))?
            }
            _ => (0, 0),
        };
        let mut member = Member {
            kind,
            link,
            mode: (mode & 0o7777) as u16,
            uid,
            gid,
            mtime,
            xattrs: pax.xattrs,
            device,
            size: 0,
            extents: Vec::new(),
            path: Vec::new(),
        };
        if kind == Kind::File {
            let stored = match pax.size {
                Some(size) => Some(size),
                None => number(&old.size).and_then(|size| u64::try_from(size).ok()),
            };
            // Room for the padding; no archive is that long.
            let stored = stored
                .filter(|size| *size <= i64::MAX as u64)
                .ok_or_else(|| fail("size"))?;
            self.set_data(stored);
            member.size = stored;
            let map = if let Some(gnu) = header.as_gnu()
                && header.entry_type().is_gnu_sparse()
            {
                member.size = number(&gnu.realsize)
                    .and_then(|size| u64::try_from(size).ok())
                    .ok_or_else(|| fail("size"))?;
                Some(self.old_gnu_map(&path, gnu)?)
            } else {
                let form =
                    pax_form(&pax.sparse).map_err(|source| EntryError::Sparse(source).at(&path))?;
                if let (PaxForm::Map(_) | PaxForm::InData, size) = (&form, pax.sparse.real_size) {
                    member.size = size.ok_or_else(|| fail("size"))?;
                }
                match form {
                    PaxForm::NotSparse => None,
                    PaxForm::Map(numbers) => Some(
                        super::sparse::Map::from_pax(numbers)
                            .map_err(|source| EntryError::Sparse(source).at(&path))?,
                    ),
                    PaxForm::InData => Some(self.map_in_data(&path)?),
                }
            };
            member.extents = match map {
                Some(map) => map
                    .finish(member.size, self.data_left)
                    .map_err(|source| EntryError::Sparse(source).at(&path))?,
                None if stored == 0 => Vec::new(),
                None => vec![Extent {
                    offset: 0,
                    len: stored,
                }],
            };
        }
        member.path = path;
        Ok(member)
    }

    fn set_data(&mut self, len: u64) {
        self.data_left = len;
        self.padding = len.next_multiple_of(BLOCK as u64) - len;
    }

    /// Data of an extended header.
    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, Error> {
        let offset = self.source.offset();
        let size = number(&header.as_old().size)
            .and_then(|size| u64::try_from(size).ok())
            .filter(|size| *size <= MAX_EXTENSION)
            .ok_or(Error::HeaderTooLong {
                offset,
                limit: MAX_EXTENSION,
            })?;
        self.set_data(size);
        let mut data = vec![0; size as usize];
        self.read_exact(&mut data)?;
        self.data_left = 0;
        Ok(data)
    }

    /// Data of the present member that is at hand; empty: no more of it.
    pub(super) fn fill_data(&mut self) -> Result<&[u8], Error> {
        let left = usize::try_from(self.data_left).unwrap_or(usize::MAX);
        let offset = self.source.offset();
        if left == 0 {
            return Ok(&[]);
        }
        let bytes = self.source.fill().map_err(|err| read_error(offset, err))?;
        if bytes.is_empty() {
            return Err(Error::Truncated { offset });
        }
        Ok(&bytes[..bytes.len().min(left)])
    }

    pub(super) fn consume_data(&mut self, len: usize) {
        self.source.consume(len);
        self.data_left -= len as u64;
    }

    /// A block of the present member's data.
    pub(super) fn read_data_block(
        &mut self,
        path: &[u8],
        block: &mut [u8; BLOCK],
    ) -> Result<(), Error> {
        self.data_left = self
            .data_left
            .checked_sub(BLOCK as u64)
            .ok_or_else(|| EntryError::Sparse(super::sparse::SparseError::Number).at(path))?;
        self.read_exact(block)
    }

    /// A block beside the present member's data.
    pub(super) fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<(), Error> {
        self.read_exact(block)
    }

    fn skip_rest(&mut self) -> Result<(), Error> {
        loop {
            let len = self.fill_data()?.len();
            if len == 0 {
                break;
            }
            self.consume_data(len);
        }
        let mut padding = [0; BLOCK];
        let len = self.padding as usize;
        self.padding = 0;
        self.read_exact(&mut padding[..len])
    }

    /// Behind the end mark there is nothing but more zeros.
    fn expect_zeros(&mut self) -> Result<(), Error> {
        loop {
            let offset = self.source.offset();
            let bytes = self.source.fill().map_err(|err| read_error(offset, err))?;
            if bytes.is_empty() {
                return Ok(());
            }
            if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
                return Err(Error::TrailingData {
                    offset: offset + at as u64,
                });
            }
            let len = bytes.len();
            self.source.consume(len);
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        let offset = self.source.offset();
        self.source
            .read_full(buffer)
            .map_err(|err| read_error(offset, err))
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        if self.read(buffer)? < buffer.len() {
            return Err(Error::Truncated {
                offset: self.source.offset(),
            });
        }
        Ok(())
    }
}

fn read_error(offset: u64, source: std::io::Error) -> Error {
    Error::Read { offset, source }
}

fn kind(header: &Header, path: &[u8]) -> Result<Kind, Error> {
    Ok(match header.as_old().linkflag[0] {
        // Before POSIX a directory was a file with a slash behind its name.
        0 if path.ends_with(b"/") => Kind::Directory,
        0 | b'0' | b'7' | b'S' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::CharDevice,
        b'4' => Kind::BlockDevice,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        other => {
            return Err(EntryError::Type(char::from(other).escape_default().to_string()).at(path));
        }
    })
}

/// Major and minor number; v7 headers have none.
fn device(header: &Header) -> Option<(i64, i64)> {
    // The fields lie in the same place in both forms.
    let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
        (Some(ustar), _) => (&ustar.dev_major, &ustar.dev_minor),
        (_, Some(gnu)) => (&gnu.dev_major, &gnu.dev_minor),
        _ => return None,
    };
    Some((number(major)?, number(minor)?))
}

fn c_string(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
