//! From a layer's bytes, as the registry sent them, to its archive's.

use std::io::{self, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;
use unpacker_client::Compression;

/// Pieces in which compressed bytes are taken.
const INPUT_BUFFER: usize = 64 * 1024;

/// Largest zstd window: what `zstd --long` uses without further consent, and
/// the memory that decompression may take.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// What the first bytes say. Registries hold layers whose media type says
/// otherwise, and the bytes are right; no tar archive begins like this.
fn sniff(start: &[u8]) -> Compression {
    match start {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        // A frame, or one that is to be skipped.
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Compression::Zstd,
        _ => Compression::None,
    }
}

type Input<R> = BufReader<Chain<Cursor<Vec<u8>>, R>>;

/// The archive of a layer, uncompressed.
pub struct Decompressed<R: Read>(Decoder<R>);

enum Decoder<R: Read> {
    None(Input<R>),
    Gzip(Box<MultiGzDecoder<Input<R>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, Input<R>>>),
}

impl<R: Read> Decompressed<R> {
    /// `declared`, of the media type, decides where the bytes are too few to
    /// tell: nothing at all is an empty archive, but no gzip or zstd stream.
    ///
    /// # Errors
    /// The first bytes cannot be read.
    pub fn new(mut reader: R, declared: Compression) -> io::Result<Self> {
        let mut start = Vec::with_capacity(4);
        reader.by_ref().take(4).read_to_end(&mut start)?;
        if start.is_empty() && declared != Compression::None {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let compression = sniff(&start);
        let input = BufReader::with_capacity(INPUT_BUFFER, Cursor::new(start).chain(reader));
        let decoder = match compression {
            Compression::None => Decoder::None(input),
            Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(input))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Decoder::Zstd(Box::new(decoder))
            }
        };
        Ok(Self(decoder))
    }
}

impl<R: Read> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Decoder::None(inner) => inner.read(buffer),
            Decoder::Gzip(inner) => inner.read(buffer),
            Decoder::Zstd(inner) => inner.read(buffer),
        }
    }
}
