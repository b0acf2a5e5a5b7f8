//! A file's content on its way into the image.
//!
//! Whole blocks are written as they arrive. A chunk of nothing but zeros is
//! not written: the file gets a chunk map with a hole in it. The last, partial
//! block of a file is kept in memory, to lie beside its inode, where it is
//! small and the budget allows.

use std::io::{Seek, Write};

use super::chunk::{ChunkMap, is_zero};
use super::inode::EXTENDED_LEN;
use super::{BLOCK, Error, Writer, padding};

/// Largest tail worth keeping in memory: it saves at least its own length.
const MAX_TAIL: u64 = 2048;

/// Where a file's content lies in the image.
#[derive(Debug)]
pub struct Content {
    pub(super) size: u64,
    pub(super) place: Place,
}

#[derive(Debug)]
pub(super) enum Place {
    /// Blocks from `start`, then `tail` beside the inode.
    Flat {
        start: u32,
        tail: Box<[u8]>,
    },
    Chunks(ChunkMap),
}

impl Content {
    pub fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn memory(&self) -> usize {
        match &self.place {
            Place::Flat { tail, .. } => tail.len(),
            // The map is written out in full: count what it becomes.
            Place::Chunks(map) => map.memory().max(map.encoded_len()),
        }
    }
}

/// Takes the content of one file, from its first byte to its last.
pub struct FileWriter<'w, W: Write + Seek> {
    image: &'w mut Writer<W>,
    size: u64,
    given: u64,
    /// Where the tail begins that is kept beside the inode; `size` for none.
    tail_at: u64,
    tail: Vec<u8>,
    map: ChunkMap,
    /// First block of the chunk being written; None while all of it is zero.
    chunk_start: Option<u32>,
}

impl<'w, W: Write + Seek> FileWriter<'w, W> {
    /// `xattrs_len` is the room that the file's xattrs take beside its inode.
    pub(super) fn new(image: &'w mut Writer<W>, size: u64, xattrs_len: usize) -> Self {
        let tail = size % BLOCK;
        let beside = (EXTENDED_LEN + xattrs_len) as u64 + tail;
        let keep = (1..=MAX_TAIL).contains(&tail) && beside <= BLOCK && image.reserve_tail(tail);
        Self {
            image,
            size,
            given: 0,
            tail_at: if keep { size - tail } else { size },
            tail: Vec::with_capacity(if keep { tail as usize } else { 0 }),
            map: ChunkMap::for_size(size),
            chunk_start: None,
        }
    }

    /// The next bytes of the file.
    pub fn data(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        self.check_room(bytes.len() as u64)?;
        while !bytes.is_empty() {
            if self.given >= self.tail_at {
                self.tail.extend_from_slice(bytes);
                self.given += bytes.len() as u64;
                return Ok(());
            }
            let room = self.chunk_end() - self.given;
            let (part, rest) = bytes.split_at(bytes.len().min(room as usize));
            self.chunk_part(part)?;
            bytes = rest;
        }
        Ok(())
    }

    /// The next `len` bytes of the file are zero.
    pub fn hole(&mut self, mut len: u64) -> Result<(), Error> {
        self.check_room(len)?;
        while len > 0 {
            if self.given >= self.tail_at {
                self.tail.resize(self.tail.len() + len as usize, 0);
                self.given += len;
                return Ok(());
            }
            let chunk = self.map.chunk_bytes();
            let whole = len.min(self.tail_at - self.given) / chunk;
            if whole > 0 && self.given.is_multiple_of(chunk) {
                self.map.push_holes(whole);
                self.given += whole * chunk;
                len -= whole * chunk;
                continue;
            }
            let part = len.min(self.chunk_end() - self.given);
            if self.chunk_start.is_some() {
                self.image.append_zeros(part)?;
            }
            self.advance(part)?;
            len -= part;
        }
        Ok(())
    }

    /// Length of the image so far.
    pub fn image_written(&self) -> u64 {
        self.image.written()
    }

    /// The file is complete.
    pub fn finish(mut self) -> Result<Content, Error> {
        if self.given != self.size {
            return Err(Error::WrongSize {
                expected: self.size,
                given: self.given,
            });
        }
        let open = !self.tail_at.is_multiple_of(self.map.chunk_bytes());
        let ends_in_hole = open && self.chunk_start.is_none() && is_zero(&self.tail);
        if !self.map.has_holes() && !ends_in_hole {
            if open {
                self.given = self.tail_at;
                self.start_chunk()?;
                self.close_chunk()?;
            }
            return Ok(Content {
                size: self.size,
                place: Place::Flat {
                    start: self.map.first_block().unwrap_or(0),
                    tail: self.tail.into_boxed_slice(),
                },
            });
        }
        // A map covers the tail too.
        let tail = std::mem::take(&mut self.tail);
        self.image.release_tail(tail.len() as u64);
        self.given = self.tail_at;
        self.tail_at = self.size;
        if !tail.is_empty() {
            self.chunk_part(&tail)?;
        }
        if !self.size.is_multiple_of(self.map.chunk_bytes()) {
            self.close_chunk()?;
        }
        self.map.shrink();
        Ok(Content {
            size: self.size,
            place: Place::Chunks(self.map),
        })
    }

    fn check_room(&self, len: u64) -> Result<(), Error> {
        match self.given.checked_add(len) {
            Some(given) if given <= self.size => Ok(()),
            given => Err(Error::WrongSize {
                expected: self.size,
                given: given.unwrap_or(u64::MAX),
            }),
        }
    }

    fn chunk_end(&self) -> u64 {
        let chunk = self.map.chunk_bytes();
        (self.given - self.given % chunk + chunk).min(self.tail_at)
    }

    /// `part` lies within one chunk.
    fn chunk_part(&mut self, part: &[u8]) -> Result<(), Error> {
        if self.chunk_start.is_some() || !is_zero(part) {
            self.start_chunk()?;
            self.image.append(part)?;
        }
        self.advance(part.len() as u64)
    }

    /// Gives the chunk a place, and writes the zeros that it began with.
    fn start_chunk(&mut self) -> Result<(), Error> {
        if self.chunk_start.is_none() {
            self.chunk_start = Some(self.image.next_block());
            self.image
                .append_zeros(self.given % self.map.chunk_bytes())?;
        }
        Ok(())
    }

    fn advance(&mut self, len: u64) -> Result<(), Error> {
        self.given += len;
        if self.given.is_multiple_of(self.map.chunk_bytes()) {
            self.close_chunk()?;
        }
        Ok(())
    }

    fn close_chunk(&mut self) -> Result<(), Error> {
        match self.chunk_start.take() {
            Some(start) => {
                self.map.push_data(start, 1);
                self.image.append_zeros(padding(self.given, BLOCK))
            }
            None => {
                self.map.push_holes(1);
                Ok(())
            }
        }
    }
}
