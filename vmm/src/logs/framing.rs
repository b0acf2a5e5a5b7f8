//! The CRI log format: output split into records, one to a line of the file.
//!
//! ```text
//! 2026-01-02T03:04:05.000000006Z stdout F a whole line, or the end of one
//! 2026-01-02T03:04:05.000000006Z stderr P a piece of a line; more of it follows
//! ```
//!
//! A reader joins the contents of one stream's records, a newline after each
//! F and nothing after each P, and has the bytes the container wrote. So an
//! unterminated last line is a P as well, as containerd has it: the kubelet and
//! crictl then print no newline that was not there.

use memchr::memchr;

/// Content of one record; a longer line becomes several. containerd's default.
pub const MAX_CONTENT: usize = 16 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamKind {
    Stdout,
    Stderr,
}

impl StreamKind {
    #[must_use]
    pub fn parse(name: &[u8]) -> Option<Self> {
        match name {
            b"stdout" => Some(Self::Stdout),
            b"stderr" => Some(Self::Stderr),
            _ => None,
        }
    }

    fn name(self) -> &'static [u8] {
        match self {
            Self::Stdout => b"stdout",
            Self::Stderr => b"stderr",
        }
    }
}

/// Frames one stream. How its bytes are cut into calls makes no difference to
/// the records.
#[derive(Debug)]
pub struct Framer {
    kind: StreamKind,
    /// The line's bytes that are in no record yet, at most [`MAX_CONTENT`].
    held: Vec<u8>,
    /// A P record of the current line was made.
    mid_line: bool,
}

impl Framer {
    #[must_use]
    pub fn new(kind: StreamKind) -> Self {
        Self {
            kind,
            held: Vec::new(),
            mid_line: false,
        }
    }

    /// A line was begun in the file and not ended.
    #[must_use]
    pub fn mid_line(&self) -> bool {
        self.mid_line
    }

    /// Appends to `out` the records that `bytes` complete. `stamp` is the time
    /// in RFC 3339.
    pub fn push(&mut self, mut bytes: &[u8], stamp: &str, out: &mut Vec<u8>) {
        while !bytes.is_empty() {
            let used = self.push_line(bytes, stamp, out);
            bytes = &bytes[used..];
        }
    }

    /// As [`Framer::push`], up to the end of the current line at most; returns
    /// how many bytes that took.
    pub fn push_line(&mut self, bytes: &[u8], stamp: &str, out: &mut Vec<u8>) -> usize {
        let end = memchr(b'\n', bytes);
        let mut content = &bytes[..end.unwrap_or(bytes.len())];
        // A full piece waits for one byte more: only then is it known whether
        // the line goes on.
        while self.held.len() + content.len() > MAX_CONTENT {
            let (piece, rest) = content.split_at(MAX_CONTENT - self.held.len());
            self.record(b'P', piece, stamp, out);
            self.mid_line = true;
            content = rest;
        }
        match end {
            Some(at) => {
                self.record(b'F', content, stamp, out);
                self.mid_line = false;
                at + 1
            }
            None => {
                self.held.extend_from_slice(content);
                bytes.len()
            }
        }
    }

    /// The stream ended: what is left of a last line without a newline.
    pub fn finish(&mut self, stamp: &str, out: &mut Vec<u8>) {
        if !self.held.is_empty() {
            self.record(b'P', &[], stamp, out);
        }
        self.mid_line = false;
    }

    fn record(&mut self, tag: u8, content: &[u8], stamp: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(stamp.as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.kind.name());
        out.extend_from_slice(&[b' ', tag, b' ']);
        out.extend_from_slice(&self.held);
        out.extend_from_slice(content);
        out.push(b'\n');
        self.held.clear();
    }
}

/// What a reader of the format makes of records; the stamps apart.
#[cfg(any(test, feature = "hostile"))]
pub(crate) fn decode(log: &[u8]) -> Vec<(StreamKind, u8, Vec<u8>)> {
    let mut records = Vec::new();
    for line in log.split_inclusive(|&b| b == b'\n') {
        let line = line.strip_suffix(b"\n").expect("a record ends its line");
        let mut parts = line.splitn(4, |&b| b == b' ');
        let mut part = || parts.next().expect("a record of four parts");
        let (stamp, kind, tag, content) = (part(), part(), part(), part());
        let stamp = std::str::from_utf8(stamp).expect("a time in ASCII");
        humantime::parse_rfc3339(stamp).expect("a time in RFC 3339");
        let kind = StreamKind::parse(kind).expect("a stream");
        assert!(tag == b"P" || tag == b"F", "{tag:?}");
        records.push((kind, tag[0], content.to_vec()));
    }
    records
}

/// The bytes of one stream, as the kubelet and crictl put them together.
#[cfg(any(test, feature = "hostile"))]
pub(crate) fn content(log: &[u8], kind: StreamKind) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (of, tag, content) in decode(log) {
        if of == kind {
            bytes.extend(content);
            if tag == b'F' {
                bytes.push(b'\n');
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STAMP: &str = "2026-01-02T03:04:05.000000006Z";

    fn frame(chunks: &[&[u8]]) -> Vec<u8> {
        let mut framer = Framer::new(StreamKind::Stdout);
        let mut out = Vec::new();
        for chunk in chunks {
            framer.push(chunk, STAMP, &mut out);
        }
        framer.finish(STAMP, &mut out);
        out
    }

    fn tags(log: &[u8]) -> Vec<(u8, usize)> {
        decode(log)
            .into_iter()
            .map(|(_, tag, content)| (tag, content.len()))
            .collect()
    }

    #[test]
    fn a_line_is_a_full_record_even_when_empty() {
        assert_eq!(
            frame(&[b"hello\n\n"]),
            b"2026-01-02T03:04:05.000000006Z stdout F hello\n\
              2026-01-02T03:04:05.000000006Z stdout F \n"
        );
    }

    #[test]
    fn a_last_line_without_newline_is_a_partial_record() {
        assert_eq!(tags(&frame(&[b"one\ntwo"])), [(b'F', 3), (b'P', 3)]);
        assert_eq!(
            content(&frame(&[b"one\ntwo"]), StreamKind::Stdout),
            b"one\ntwo"
        );
        assert!(frame(&[]).is_empty());
    }

    #[test]
    fn a_long_line_is_split_and_a_line_of_just_the_limit_is_not() {
        let max = MAX_CONTENT;
        let line = |len: usize| [vec![b'x'; len], vec![b'\n']].concat();
        assert_eq!(tags(&frame(&[&line(max)])), [(b'F', max)]);
        assert_eq!(tags(&frame(&[&line(max + 1)])), [(b'P', max), (b'F', 1)]);
        assert_eq!(
            tags(&frame(&[&line(3 * max)])),
            [(b'P', max), (b'P', max), (b'F', max)]
        );
        assert_eq!(tags(&frame(&[&vec![b'x'; max]])), [(b'P', max)]);
    }

    #[test]
    fn the_end_of_a_line_can_be_waited_for() {
        let mut framer = Framer::new(StreamKind::Stderr);
        let mut out = Vec::new();
        framer.push(&vec![b'x'; MAX_CONTENT + 1], STAMP, &mut out);
        assert!(framer.mid_line());
        assert_eq!(framer.push_line(b"end\nnext\n", STAMP, &mut out), 4);
        assert!(!framer.mid_line());
    }

    /// Text with long lines, short lines, and bytes that are no text.
    fn output() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            Just(b"\n".to_vec()),
            (MAX_CONTENT - 2..MAX_CONTENT + 3).prop_map(|n| vec![b'a'; n]),
            (0usize..3 * MAX_CONTENT).prop_map(|n| vec![b'b'; n]),
        ];
        prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn content_is_kept_and_cuts_do_not_show(
            bytes in output(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let whole = frame(&[&bytes]);
            prop_assert_eq!(content(&whole, StreamKind::Stdout), bytes.clone());
            for (_, _, content) in decode(&whole) {
                prop_assert!(content.len() <= MAX_CONTENT);
            }

            let mut cuts: Vec<usize> =
                cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> =
                cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(frame(&chunks), whole);
        }
    }
}
