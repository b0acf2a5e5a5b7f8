//! A log that a guest may write to, or make this program write to, without
//! end: it keeps its newest part.

use std::fs::File;
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// A file that is open for append and read. What is no regular file (a pipe, a
/// terminal) bounds itself and is written to as it is.
pub struct BoundedLog<W> {
    to: W,
    limit: u64,
    is_regular: bool,
    /// What may be written before its size is looked at again.
    room: u64,
}

impl<W: Write + AsFd> BoundedLog<W> {
    /// Beyond `limit` bytes the file is cut to the newer half of that. What is
    /// written must not be buffered by `to`.
    pub fn new(to: W, limit: u64) -> io::Result<Self> {
        let mut log = Self {
            to,
            limit,
            is_regular: false,
            room: 0,
        };
        log.is_regular = log.file().metadata()?.is_file();
        Ok(log)
    }

    /// What is written to, as a file. No descriptor more: who writes may not be
    /// let to have one made, and may have closed all but a few.
    fn file(&self) -> ManuallyDrop<File> {
        // SAFETY: `to` owns the descriptor and lives longer than what is made
        // here, which does not close it.
        ManuallyDrop::new(unsafe { File::from_raw_fd(self.to.as_fd().as_raw_fd()) })
    }

    fn wrote(&mut self, bytes: usize) -> io::Result<()> {
        if !self.is_regular {
            return Ok(());
        }
        if let Some(room) = self.room.checked_sub(bytes as u64) {
            self.room = room;
            return Ok(());
        }
        let file = self.file();
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
