//! The archive's bytes, counted.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;

/// Pieces in which the archive is read.
const BUFFER: usize = 128 * 1024;

/// The uncompressed archive.
pub(super) struct Source<R: Read> {
    reader: BufReader<R>,
    received: Rc<Cell<u64>>,
    /// Bytes of the archive handed out.
    offset: u64,
}

impl<R: Read> Source<R> {
    pub(super) fn new(reader: R, received: Rc<Cell<u64>>) -> Self {
        Self {
            reader: BufReader::with_capacity(BUFFER, reader),
            received,
            offset: 0,
        }
    }

    /// The next bytes, as many as are at hand; empty at the end.
    pub(super) fn fill(&mut self) -> io::Result<&[u8]> {
        loop {
            match self.reader.fill_buf() {
                Ok(_) => break,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        Ok(self.reader.buffer())
    }

    pub(super) fn consume(&mut self, len: usize) {
        self.reader.consume(len);
        self.offset += len as u64;
    }

    /// Bytes handed out so far.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that the archive took compressed, so far or in all.
    pub(super) fn received(&self) -> u64 {
        self.received.get()
    }

    /// Fills `buffer`; gives the number of bytes there were, fewer at the end.
    pub(super) fn read_full(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            let bytes = self.fill()?;
            if bytes.is_empty() {
                break;
            }
            let len = bytes.len().min(buffer.len() - filled);
            buffer[filled..filled + len].copy_from_slice(&bytes[..len]);
            self.consume(len);
            filled += len;
        }
        Ok(filled)
    }
}
