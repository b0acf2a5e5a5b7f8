//! A log that a guest may write to, or make this program write to, without
//! end: it keeps its newest part.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// A file that is open for append and read. What is no regular file (a pipe, a
/// terminal) bounds itself and is written to as it is.
pub struct BoundedLog<W> {
    to: W,
    /// The same file, if it is one to be cut.
    file: Option<File>,
    limit: u64,
    /// What may be written before its size is looked at again.
    room: u64,
}

impl<W: Write + AsFd> BoundedLog<W> {
    /// Beyond `limit` bytes the file is cut to the newer half of that. What is
    /// written must not be buffered by `to`.
    pub fn new(to: W, limit: u64) -> io::Result<Self> {
        let file = File::from(to.as_fd().try_clone_to_owned()?);
        let is_regular = file.metadata()?.is_file();
        Ok(Self {
            to,
            file: is_regular.then_some(file),
            limit,
            room: 0,
        })
    }

    fn wrote(&mut self, bytes: usize) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        if let Some(room) = self.room.checked_sub(bytes as u64) {
            self.room = room;
            return Ok(());
        }
        let mut size = file.metadata()?.len();
        if size > self.limit {
            let keep = self.limit / 2;
            let mut newest = vec![0; usize::try_from(keep).map_err(io::Error::other)?];
            file.read_exact_at(&mut newest, size - keep)?;
            file.set_len(0)?;
            self.to.write_all(&newest)?;
            size = keep;
        }
        // Half of what is left: there may be another writer, who does the same.
        self.room = (self.limit - size) / 2;
        Ok(())
    }
}

impl<W: Write + AsFd> Write for BoundedLog<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.wrote(written)?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
