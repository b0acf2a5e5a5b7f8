//! The guest's console: a log file of bounded size, and its last lines at
//! hand for when the guest ends.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};

use crate::bounded::BoundedLog;

/// Lines that go with the report of the guest's end.
const TAIL_LINES: usize = 20;
/// Characters of each; the rest of a longer line is left out.
const LINE_CHARS: usize = 400;

const PANIC: &str = "Kernel panic - not syncing: ";

/// What a kernel says last when it has no switch to end its machine by. After
/// its time stamp the line holds nothing else, so no text that the kernel only
/// repeats (a process's name, say) is taken for it.
const HALTED: [&str; 2] = [
    "reboot: System halted",
    "reboot: Power off not available: System halted instead",
];

pub struct Console {
    log: BoundedLog<File>,
    tail: Tail,
    /// A full disk is told once.
    failed: bool,
}

impl Console {
    /// `log` is open for append and read; beyond `limit` bytes it is cut to
    /// its second half.
    pub fn new(log: File, limit: u64) -> io::Result<Self> {
        Ok(Self {
            log: BoundedLog::new(log, limit)?,
            tail: Tail::default(),
            failed: false,
        })
    }

    pub fn take(&mut self, bytes: &[u8]) {
        self.tail.push(bytes);
        if let Err(error) = self.log.write_all(bytes) {
            if !self.failed {
                tracing::warn!(%error, "the console log cannot be written");
            }
            self.failed = true;
        }
    }

    /// Whether the kernel said that it stopped its processors for good.
    pub fn halted(&self) -> bool {
        self.tail.lines.iter().any(|line| is_halt(line))
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

fn is_halt(line: &str) -> bool {
    let message = match line
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
    {
        Some((stamp, message)) if stamp.trim().parse::<f64>().is_ok() => message,
        _ => line,
    };
    HALTED.contains(&message)
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
    fn a_halt_is_the_kernels_own_line() {
        let (mut console, _file) = console(1 << 20);
        console.take(b"[    1.5] reboot: System halted[12]: segfault at 0\n");
        console.take(b"[    1.6] x: reboot: System halted\n");
        assert!(!console.halted());
        console.take(b"[    2.123456] reboot: System halted\r\n");
        assert!(console.halted());
        assert!(is_halt(HALTED[1]));
    }

    #[test]
    fn a_panic_is_found() {
        let (mut console, _file) = console(1 << 20);
        assert_eq!(console.panic_reason(), None);
        console.take(b"[    0.1] Kernel panic - not syncing: No working init found.\nmore\n");
        assert_eq!(console.panic_reason(), Some("No working init found."));
    }
}
