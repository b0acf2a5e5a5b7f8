//! One log file and what happens when it takes no more.

use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};

use memchr::memrchr;

/// A log file that is appended to. Records that cannot be written are dropped
/// and counted: a full disk must not stop the container.
pub(super) struct LogFile {
    container: String,
    file: File,
    dropped_bytes: u64,
}

impl LogFile {
    pub(super) fn new(container: &str, file: File) -> Self {
        Self {
            container: container.to_owned(),
            file,
            dropped_bytes: 0,
        }
    }

    /// Writes whole records.
    pub(super) fn write(&mut self, records: &[u8]) {
        let mut done = 0;
        while done < records.len() {
            match self.file.write(&records[done..]) {
                Ok(0) => return self.failed(records, done, &ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return self.failed(records, done, &e),
            }
        }
    }

    fn failed(&mut self, records: &[u8], done: usize, error: &io::Error) {
        if self.dropped_bytes == 0 {
            tracing::warn!(
                container = self.container,
                %error,
                "the container's log cannot be written; output is dropped until it can"
            );
        }
        // The part of a record that got in is taken out again, so that the
        // next one starts its own line.
        let whole = memrchr(b'\n', &records[..done]).map_or(0, |at| at + 1);
        if let Err(error) = self.cut(done - whole) {
            tracing::warn!(
                container = self.container,
                %error,
                "the container's log is left with a torn record"
            );
        }
        self.dropped_bytes += (records.len() - whole) as u64;
    }

    fn cut(&mut self, torn: usize) -> io::Result<()> {
        if torn == 0 {
            return Ok(());
        }
        let len = self.file.metadata()?.len();
        self.file.set_len(len.saturating_sub(torn as u64))?;
        self.file.seek(SeekFrom::End(0)).map(drop)
    }

    #[cfg(test)]
    pub(super) fn dropped_bytes(&self) -> u64 {
        self.dropped_bytes
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        if self.dropped_bytes > 0 {
            tracing::warn!(
                container = self.container,
                bytes = self.dropped_bytes,
                "output of the container was dropped from this log"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_device_that_is_full_costs_the_output_and_nothing_else() {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut log = LogFile::new("c", full);
        log.write(b"one\n");
        log.write(b"two\n");
        assert_eq!(log.dropped_bytes(), 8);
    }

    /// A file system of one page of room.
    struct Tmpfs(tempfile::TempDir);

    impl Tmpfs {
        fn mount() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let status = Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
                .arg(dir.path())
                .status()
                .unwrap();
            assert!(status.success(), "mounting a tmpfs");
            Self(dir)
        }
    }

    impl Drop for Tmpfs {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0.path()).status();
        }
    }

    #[test]
    fn a_disk_that_fills_up_leaves_whole_records_and_is_used_again() {
        let disk = Tmpfs::mount();
        let path = disk.0.path().join("0.log");
        let open = || OpenOptions::new().create(true).append(true).open(&path);
        let mut log = LogFile::new("c", open().unwrap());
        let record = [vec![b'r'; 99], vec![b'\n']].concat();
        let many = record.repeat(1000);
        log.write(&many);
        let written = std::fs::read(&path).unwrap();
        assert_eq!(
            written.len() as u64 + log.dropped_bytes(),
            many.len() as u64
        );
        assert!(log.dropped_bytes() > 0, "the disk was not full");
        assert_eq!(written.len() % record.len(), 0, "a torn record");

        // Room again, as after the file was rotated away.
        std::fs::OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        log.write(b"again\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"again\n");
        drop(log);
    }
}
