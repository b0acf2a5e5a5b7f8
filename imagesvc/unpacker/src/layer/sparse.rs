//! Sparse files in GNU tar's four forms: which parts of a file are stored.

use std::io::Read;

use tar::{GnuExtSparseHeader, GnuHeader, GnuSparseHeader};

use super::archive::Archive;
use super::error::{EntryError, Error};
use super::header::{BLOCK, decimal, number};
use super::pax::PaxSparse;

/// Parts of one file: 16 MiB of memory. A file with more holes than that
/// gains nothing from being sparse.
const MAX_EXTENTS: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SparseError {
    #[error("a number in its map is malformed")]
    Number,
    #[error("its parts overlap, are out of order or lie beyond its end")]
    Order,
    #[error("its parts add up to {mapped} bytes where {stored} are stored")]
    Length { mapped: u64, stored: u64 },
    #[error("it has more than {MAX_EXTENTS} parts")]
    TooManyParts,
    #[error("its map is in an unknown version")]
    Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Collects extents, and checks them.
#[derive(Debug, Default)]
pub(super) struct Map {
    extents: Vec<Extent>,
    end: u64,
    mapped: u64,
}

impl Map {
    fn push(&mut self, offset: u64, len: u64) -> Result<(), SparseError> {
        if offset < self.end {
            return Err(SparseError::Order);
        }
        self.end = offset.checked_add(len).ok_or(SparseError::Order)?;
        // No more than `end`, so it does not overflow.
        self.mapped += len;
        if len > 0 {
            if self.extents.len() == MAX_EXTENTS {
                return Err(SparseError::TooManyParts);
            }
            self.extents.push(Extent { offset, len });
        }
        Ok(())
    }

    /// For a file of `size` bytes of which `stored` are in the archive.
    pub(super) fn finish(self, size: u64, stored: u64) -> Result<Vec<Extent>, SparseError> {
        if self.end > size {
            return Err(SparseError::Order);
        }
        if self.mapped != stored {
            return Err(SparseError::Length {
                mapped: self.mapped,
                stored,
            });
        }
        Ok(self.extents)
    }

    fn push_headers(&mut self, headers: &[GnuSparseHeader]) -> Result<(), SparseError> {
        for header in headers {
            // An unused slot is empty, not zero.
            if header.offset[0] == 0 || header.numbytes[0] == 0 {
                continue;
            }
            self.push(whole(&header.offset)?, whole(&header.numbytes)?)?;
        }
        Ok(())
    }

    /// PAX versions 0.0 and 0.1.
    pub(super) fn from_pax(numbers: &[u64]) -> Result<Self, SparseError> {
        let mut map = Self::default();
        let (pairs, rest) = numbers.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(SparseError::Number);
        }
        for [offset, len] in pairs {
            map.push(*offset, *len)?;
        }
        Ok(map)
    }
}

fn whole(field: &[u8]) -> Result<u64, SparseError> {
    number(field)
        .and_then(|number| u64::try_from(number).ok())
        .ok_or(SparseError::Number)
}

/// The form in which PAX records announce a sparse file.
pub(super) enum PaxForm<'p> {
    NotSparse,
    Map(&'p [u64]),
    /// 1.0: before the data.
    InData,
}

pub(super) fn pax_form(sparse: &PaxSparse) -> Result<PaxForm<'_>, SparseError> {
    match (sparse.major, sparse.minor, &sparse.map) {
        (Some(1), Some(0), _) => Ok(PaxForm::InData),
        (None | Some(0), None | Some(0 | 1), Some(map)) => Ok(PaxForm::Map(map)),
        (None, None, None) => Ok(PaxForm::NotSparse),
        _ => Err(SparseError::Version),
    }
}

impl<R: Read> Archive<R> {
    /// The map of the old GNU form: in the header and in blocks behind it.
    pub(super) fn old_gnu_map(&mut self, path: &[u8], header: &GnuHeader) -> Result<Map, Error> {
        let fail = |source| EntryError::Sparse(source).at(path);
        let mut map = Map::default();
        map.push_headers(&header.sparse).map_err(fail)?;
        let mut more = header.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            self.read_block(block.as_mut_bytes())?;
            map.push_headers(block.sparse()).map_err(fail)?;
            more = block.is_extended();
        }
        Ok(map)
    }

    /// The map of version 1.0: decimal numbers on lines of their own, padded
    /// to a block, at the start of the data.
    pub(super) fn map_in_data(&mut self, path: &[u8]) -> Result<Map, Error> {
        let fail = |source| EntryError::Sparse(source).at(path);
        let mut numbers = Numbers {
            block: [0; BLOCK],
            at: BLOCK,
        };
        let count = numbers.next(self, path)?;
        if count > MAX_EXTENTS as u64 {
            return Err(fail(SparseError::TooManyParts));
        }
        let mut map = Map::default();
        for _ in 0..count {
            let offset = numbers.next(self, path)?;
            let len = numbers.next(self, path)?;
            map.push(offset, len).map_err(fail)?;
        }
        Ok(map)
    }
}

struct Numbers {
    block: [u8; BLOCK],
    at: usize,
}

impl Numbers {
    fn next<R: Read>(&mut self, archive: &mut Archive<R>, path: &[u8]) -> Result<u64, Error> {
        let fail = || EntryError::Sparse(SparseError::Number).at(path);
        // As many digits as 64 bits have.
        let mut digits = [0; 20];
        let mut len = 0;
        loop {
            if self.at == BLOCK {
                archive.read_data_block(path, &mut self.block)?;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            if byte == b'\n' {
                return decimal(&digits[..len]).ok_or_else(fail);
            }
            *digits.get_mut(len).ok_or_else(fail)? = byte;
            len += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_in_order_and_add_up() {
        let map = |numbers: &[u64]| Map::from_pax(numbers);
        assert_eq!(
            map(&[0, 5, 10, 0, 10, 5]).unwrap().finish(20, 10).unwrap(),
            [Extent { offset: 0, len: 5 }, Extent { offset: 10, len: 5 }]
        );
        assert_eq!(map(&[0, 5, 4, 1]).unwrap_err(), SparseError::Order);
        assert_eq!(map(&[u64::MAX, 1]).unwrap_err(), SparseError::Order);
        assert_eq!(map(&[0]).unwrap_err(), SparseError::Number);
        assert_eq!(
            map(&[0, 5]).unwrap().finish(4, 5).unwrap_err(),
            SparseError::Order
        );
        assert_eq!(
            map(&[0, 5]).unwrap().finish(5, 4).unwrap_err(),
            SparseError::Length {
                mapped: 5,
                stored: 4
            }
        );
    }
}
