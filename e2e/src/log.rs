//! The CRI log format: `TIME STREAM TAG CONTENT`, tag `P` for a part of a
//! line and `F` for its end.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    pub time: String,
    pub stream: Stream,
    /// The line goes on in the stream's next record.
    pub partial: bool,
    pub content: Vec<u8>,
}

/// Every record of the log file at `path`; anything else in it is an error.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    parse(&bytes).with_context(|| path.display().to_string())
}

fn parse(bytes: &[u8]) -> Result<Vec<Record>> {
    let Some(bytes) = bytes.strip_suffix(b"\n") else {
        ensure!(bytes.is_empty(), "the last record has no end");
        return Ok(Vec::new());
    };
    bytes
        .split(|byte| *byte == b'\n')
        .enumerate()
        .map(|(n, line)| record(line).with_context(|| format!("record {}", n + 1)))
        .collect()
}

fn record(line: &[u8]) -> Result<Record> {
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let mut field = || fields.next().context("a field is missing");
    let time = std::str::from_utf8(field()?).context("time")?.to_owned();
    ensure!(
        time.len() >= 20 && time.as_bytes()[10] == b'T',
        "{time:?} is no RFC 3339 time"
    );
    let stream = match field()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        other => bail!("stream {:?}", String::from_utf8_lossy(other)),
    };
    let partial = match field()? {
        b"P" => true,
        b"F" => false,
        other => bail!("tag {:?}", String::from_utf8_lossy(other)),
    };
    Ok(Record {
        time,
        stream,
        partial,
        content: field()?.to_vec(),
    })
}

/// What the container wrote to `stream`: a newline after every whole line.
/// A last line without a newline cannot be told from one that has it, unless
/// it is partial.
#[must_use]
pub fn written(records: &[Record], stream: Stream) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records.iter().filter(|record| record.stream == stream) {
        bytes.extend_from_slice(&record.content);
        if !record.partial {
            bytes.push(b'\n');
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_line_are_put_together() {
        let log = b"2026-01-01T00:00:00.000000001Z stdout P ab\n2026-01-01T00:00:00.1Z stderr F x y\n2026-01-01T00:00:00.2Z stdout F c\n";
        let records = parse(log).unwrap();
        assert_eq!(written(&records, Stream::Stdout), b"abc\n");
        assert_eq!(written(&records, Stream::Stderr), b"x y\n");
    }

    #[test]
    fn an_empty_line_is_a_record() {
        let records = parse(b"2026-01-01T00:00:00.000000001Z stdout F \n").unwrap();
        assert_eq!(written(&records, Stream::Stdout), b"\n");
    }

    #[test]
    fn what_is_no_record_is_an_error() {
        for bad in [
            "x",
            "x\n",
            "2026-01-01T00:00:00Z stdin F a\n",
            "2026-01-01T00:00:00Z stdout X a\n",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
