//! The archive's bytes: decompressed, counted, hashed, and kept within
//! bounds.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

use super::limits::{LimitError, Limits};

/// Pieces in which the archive is decompressed and hashed.
const BUFFER: usize = 128 * 1024;

/// Pieces in which compressed bytes are taken.
const INPUT_BUFFER: usize = 64 * 1024;

/// Largest zstd window: what `zstd --long` uses without further consent, and
/// the memory that decompression may take.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// How a layer's archive is compressed, by its media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// What the first bytes say. Registries hold layers whose media type says
    /// otherwise, and the bytes are right; no tar archive begins like this.
    fn sniff(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or one that is to be skipped.
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Self::Zstd,
            _ => Self::None,
        }
    }
}

struct Counted<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.count.set(self.count.get() + len as u64);
        Ok(len)
    }
}

type Input<R> = BufReader<Chain<Cursor<Vec<u8>>, Counted<R>>>;

enum Decoder<R: Read> {
    None(Input<R>),
    Gzip(Box<MultiGzDecoder<Input<R>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, Input<R>>>),
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::None(inner) => inner.read(buffer),
            Self::Gzip(inner) => inner.read(buffer),
            Self::Zstd(inner) => inner.read(buffer),
        }
    }
}

/// Decompresses, hashes and bounds.
struct Checked<R: Read> {
    decoder: Decoder<R>,
    hasher: Sha256,
    received: Rc<Cell<u64>>,
    produced: u64,
    limits: Limits,
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.decoder.read(buffer)?;
        self.hasher.update(&buffer[..len]);
        self.produced += len as u64;
        self.limits
            .check(self.received.get(), self.produced)
            .map_err(io::Error::other)?;
        Ok(len)
    }
}

/// The uncompressed archive.
pub(super) struct Source<R: Read> {
    reader: BufReader<Checked<R>>,
    received: Rc<Cell<u64>>,
    /// Bytes of the archive handed out.
    offset: u64,
}

/// What is known once the archive was read to its end.
pub(super) struct Summary {
    pub(super) diff_id: [u8; 32],
    pub(super) uncompressed_len: u64,
}

impl<R: Read> Source<R> {
    /// `declared` decides where the bytes are too few to tell: nothing at all
    /// is an empty archive, but no gzip or zstd stream.
    pub(super) fn new(reader: R, declared: Compression, limits: Limits) -> io::Result<Self> {
        let received = Rc::new(Cell::new(0));
        let mut counted = Counted {
            inner: reader,
            count: Rc::clone(&received),
        };
        let mut start = Vec::with_capacity(4);
        counted.by_ref().take(4).read_to_end(&mut start)?;
        if start.is_empty() && declared != Compression::None {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let compression = Compression::sniff(&start);
        let input = BufReader::with_capacity(INPUT_BUFFER, Cursor::new(start).chain(counted));
        let decoder = match compression {
            Compression::None => Decoder::None(input),
            Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(input))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Decoder::Zstd(Box::new(decoder))
            }
        };
        let checked = Checked {
            decoder,
            hasher: Sha256::new(),
            received: Rc::clone(&received),
            produced: 0,
            limits,
        };
        Ok(Self {
            reader: BufReader::with_capacity(BUFFER, checked),
            received,
            offset: 0,
        })
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

    /// Bytes taken from the compressed stream so far.
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

    /// The archive was read to its end.
    pub(super) fn finish(self) -> Summary {
        let checked = self.reader.into_inner();
        Summary {
            diff_id: checked.hasher.finalize().into(),
            uncompressed_len: checked.produced,
        }
    }
}

/// The bound that made reading fail, if that was it.
pub(super) fn limit_in(err: &io::Error) -> Option<LimitError> {
    err.get_ref()?.downcast_ref::<LimitError>().copied()
}
