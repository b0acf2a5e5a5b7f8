//! A console's file, read while its VMM writes to it and, when it is too long,
//! cuts it to its newer half.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use memchr::memmem;

/// Of what was read last this much is remembered: it says where to go on.
const REMEMBERED: usize = 1024;
/// More than a VMM lets the file hold.
const MAX_BYTES: usize = 4 << 20;

pub struct Console {
    file: File,
    /// Where what is not read yet begins.
    next: u64,
    /// What lies before it, unless the file was cut.
    last: Vec<u8>,
    /// It was cut, and what was read last is not found in it.
    is_lost: bool,
}

impl Console {
    pub fn new(file: File) -> Self {
        Self {
            file,
            next: 0,
            last: Vec::new(),
            is_lost: false,
        }
    }

    /// What was written since the last call. Unless this is the last one, to be
    /// called again whenever the file was written to.
    pub fn read_new(&mut self, is_last: bool) -> io::Result<Vec<u8>> {
        let mut from = self.next - self.last.len() as u64;
        let mut bytes = self.read_from(from)?;
        let mut known = self.last.len();
        if !bytes.starts_with(&self.last) {
            from = 0;
            bytes = self.read_from(0)?;
            match memmem::rfind(&bytes, &self.last) {
                Some(at) => {
                    bytes.drain(..at);
                    from = at as u64;
                }
                // Perhaps it is cut right now: the newer half is written after
                // the file was emptied, which will be told.
                None if !self.is_lost && !is_last => {
                    self.is_lost = true;
                    return Ok(Vec::new());
                }
                // So much was written that all of it is new.
                None => known = 0,
            }
        }
        self.is_lost = false;
        self.next = from + bytes.len() as u64;
        self.last = bytes[bytes.len().saturating_sub(REMEMBERED)..].to_vec();
        bytes.drain(..known);
        Ok(bytes)
    }

    fn read_from(&self, mut at: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut chunk = [0; 16 << 10];
        while bytes.len() < MAX_BYTES {
            match self.file.read_at(&mut chunk, at) {
                Ok(0) => break,
                Ok(len) => {
                    bytes.extend_from_slice(&chunk[..len]);
                    at += len as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }
}

/// A guest's bytes for a terminal, which is not to take orders from it.
pub fn shown(bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'\n' | b'\t' | b' '..=b'~' => text.push(byte),
            // Of a line's end.
            b'\r' => {}
            _ => text.extend(byte.escape_ascii()),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Write;

    fn console() -> (Console, File, tempfile::NamedTempFile) {
        let named = tempfile::NamedTempFile::new().unwrap();
        let writer = OpenOptions::new().append(true).open(named.path()).unwrap();
        (Console::new(named.reopen().unwrap()), writer, named)
    }

    fn lines(range: std::ops::Range<u32>) -> Vec<u8> {
        range
            .flat_map(|n| format!("line {n}\n").into_bytes())
            .collect()
    }

    #[test]
    fn each_byte_comes_once() {
        let (mut console, mut writer, _file) = console();
        assert_eq!(console.read_new(false).unwrap(), b"");
        for range in [0..1, 1..3, 3..2_000, 2_000..2_001] {
            writer.write_all(&lines(range.clone())).unwrap();
            assert_eq!(console.read_new(false).unwrap(), lines(range));
            assert_eq!(console.read_new(false).unwrap(), b"");
        }
    }

    #[test]
    fn a_file_that_was_cut_goes_on_where_it_was_left() {
        let (mut console, mut writer, _file) = console();
        writer.write_all(&lines(0..1_000)).unwrap();
        console.read_new(false).unwrap();
        writer.write_all(&lines(1_000..1_010)).unwrap();
        writer.set_len(0).unwrap();
        // Seen in the middle of it.
        assert_eq!(console.read_new(false).unwrap(), b"");
        writer.write_all(&lines(500..1_010)).unwrap();
        assert_eq!(console.read_new(false).unwrap(), lines(1_000..1_010));
        // It may grow beyond what it was before anyone looks.
        writer.set_len(0).unwrap();
        writer.write_all(&lines(800..3_000)).unwrap();
        assert_eq!(console.read_new(false).unwrap(), lines(1_010..3_000));
        assert_eq!(console.read_new(true).unwrap(), b"");
    }

    #[test]
    fn what_is_all_new_is_shown_whole() {
        let (mut console, mut writer, _file) = console();
        writer.write_all(&lines(0..1_000)).unwrap();
        console.read_new(false).unwrap();
        writer.set_len(0).unwrap();
        writer.write_all(&lines(5_000..5_100)).unwrap();
        assert_eq!(console.read_new(false).unwrap(), b"");
        writer.write_all(&lines(5_100..5_101)).unwrap();
        assert_eq!(console.read_new(false).unwrap(), lines(5_000..5_101));
        // Nothing more will be told at the end.
        writer.set_len(0).unwrap();
        writer.write_all(&lines(9_000..9_001)).unwrap();
        assert_eq!(console.read_new(true).unwrap(), lines(9_000..9_001));
    }

    #[test]
    fn a_terminal_gets_text_alone() {
        assert_eq!(
            shown(b"\x1b]0;mine\x07 a\tb\r\n\xc3\xa9\n"),
            b"\\x1b]0;mine\\x07 a\tb\n\\xc3\\xa9\n"
        );
    }
}
