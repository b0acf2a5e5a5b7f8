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
    limit: u64,
    is_regular: bool,
}

impl<W: Write + AsFd> BoundedLog<W> {
    /// Beyond `limit` bytes the file is cut to the newer half of that. What is
    /// written must not be buffered by `to`.
    pub fn new(to: W, limit: u64) -> io::Result<Self> {
        let mut log = Self {
            to,
            limit,
            is_regular: false,
        };
        log.is_regular = log.file()?.metadata()?.is_file();
        Ok(log)
    }

    fn file(&self) -> io::Result<File> {
        Ok(self.to.as_fd().try_clone_to_owned()?.into())
    }

    fn cut(&mut self) -> io::Result<()> {
        let file = self.file()?;
        // Asked each time: this need not be the only writer.
        let size = file.metadata()?.len();
        if size <= self.limit {
            return Ok(());
        }
        let mut newest = vec![0; usize::try_from(self.limit / 2).map_err(io::Error::other)?];
        file.read_exact_at(&mut newest, size - self.limit / 2)?;
        file.set_len(0)?;
        self.to.write_all(&newest)
    }
}

impl<W: Write + AsFd> Write for BoundedLog<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        if self.is_regular {
            self.cut()?;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
