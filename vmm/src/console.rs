//! The guest's console: a log file of bounded size, and its last lines at
//! hand for when the guest ends.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// Lines that go with the report of the guest's end.
const TAIL_LINES: usize = 20;
/// Characters of each; the rest of a longer line is left out.
const LINE_CHARS: usize = 400;

const PANIC: &str = "Kernel panic - not syncing: ";

pub struct Console {
    log: File,
    limit: u64,
    size: u64,
    tail: Tail,
    /// A full disk is told once.
    failed: bool,
}

impl Console {
    /// `log` is open for append and read; beyond `limit` bytes it is cut to
    /// its second half.
    pub fn new(log: File, limit: u64) -> io::Result<Self> {
        let size = log.metadata()?.len();
        Ok(Self {
            log,
            limit,
            size,
            tail: Tail::default(),
            failed: false,
        })
    }

    pub fn take(&mut self, bytes: &[u8]) {
        self.tail.push(bytes);
        if let Err(error) = self.append(bytes) {
            if !self.failed {
                tracing::warn!(%error, "the console log cannot be written");
            }
            self.failed = true;
        }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.log.write_all(bytes)?;
        self.size += bytes.len() as u64;
        if self.size > self.limit {
            let mut newest = vec![0; usize::try_from(self.limit / 2).map_err(io::Error::other)?];
            self.log
                .read_exact_at(&mut newest, self.size - self.limit / 2)?;
            self.log.set_len(0)?;
            self.size = 0;
            self.log.write_all(&newest)?;
            self.size = newest.len() as u64;
        }
        Ok(())
    }

    /// The kernel's reason for a panic, if one was seen among the last lines.
    pub fn panic_reason(&self) -> Option<&str> {
        let lines = self.tail.lines.iter();
        lines
            .rev()
            .find_map(|line| line.split_once(PANIC).map(|(_, reason)| reason))
    }

    /// The last lines, oldest first, printable characters only.
    pub fn last_lines(&self) -> Vec<String> {
        let mut lines: Vec<_> = self.tail.lines.iter().cloned().collect();
        let unfinished = printable(&self.tail.partial);
        if !unfinished.is_empty() {
            lines.push(unfinished);
        }
        lines
    }
}

#[derive(Default)]
struct Tail {
    lines: VecDeque<String>,
    partial: Vec<u8>,
}

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                let line = printable(&self.partial);
                self.partial.clear();
                if line.is_empty() {
                    continue;
                }
                if self.lines.len() == TAIL_LINES {
                    self.lines.pop_front();
                }
                self.lines.push_back(line);
            } else if self.partial.len() < LINE_CHARS * 4 {
                self.partial.push(byte);
            }
        }
    }
}

/// What a guest writes ends up in the host's logs and on terminals.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .filter(|c| !c.is_control())
        .take(LINE_CHARS)
        .collect::<String>()
        .trim_end()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};

    fn console(limit: u64) -> (Console, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = OpenOptions::new()
            .append(true)
            .read(true)
            .open(file.path())
            .unwrap();
        (Console::new(log, limit).unwrap(), file)
    }

    #[test]
    fn the_log_keeps_its_newest_half() {
        let (mut console, file) = console(4096);
        for line in 0..2000 {
            console.take(format!("line {line}\n").as_bytes());
            assert!(fs::metadata(file.path()).unwrap().len() <= 4096);
        }
        let text = fs::read_to_string(file.path()).unwrap();
        assert!(text.ends_with("line 1998\nline 1999\n"));
        assert!(text.len() >= 2048);
    }

    #[test]
    fn the_last_lines_are_kept_without_control_characters() {
        let (mut console, _file) = console(1 << 20);
        for line in 0..50 {
            console.take(format!("\x1b[1mline {line}\r\n").as_bytes());
        }
        console.take(b"no end");
        let lines = console.last_lines();
        assert_eq!(lines.len(), TAIL_LINES + 1);
        assert_eq!(lines[0], "[1mline 30");
        assert_eq!(lines[TAIL_LINES], "no end");
    }

    #[test]
    fn an_endless_line_is_bounded() {
        let (mut console, _file) = console(1 << 20);
        for _ in 0..100 {
            console.take(&[b'x'; 1000]);
        }
        assert_eq!(console.last_lines(), ["x".repeat(LINE_CHARS)]);
    }

    #[test]
    fn a_panic_is_found() {
        let (mut console, _file) = console(1 << 20);
        assert_eq!(console.panic_reason(), None);
        console.take(b"[    0.1] Kernel panic - not syncing: No working init found.\nmore\n");
        assert_eq!(console.panic_reason(), Some("No working init found."));
    }
}
