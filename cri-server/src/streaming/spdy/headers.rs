//! Header blocks: pairs of names and values, compressed with zlib, in one
//! context for all blocks of a direction (draft 3.1, 2.6.10).

use flate2::{Decompress, FlushDecompress, Status};

use super::dictionary::DICTIONARY;

/// A block after inflation; a real one is below 100 bytes.
const MAX_BLOCK: usize = 16 << 10;
const MAX_PAIRS: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("a header block that does not inflate: {0}")]
    Inflate(String),
    #[error("a header block larger than {MAX_BLOCK} bytes")]
    TooLarge,
    #[error("a header block of more than {MAX_PAIRS} pairs")]
    TooMany,
    #[error("a header block that is cut off")]
    Short,
    #[error("a header that is not text")]
    NotText,
}

/// Names in lower case. Of a value of several parts, the first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// `name` in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }
}

/// Reads the blocks of one connection, in their order, every one of them:
/// each needs the state that the one before left.
pub struct Inflater {
    zlib: Decompress,
}

impl Default for Inflater {
    fn default() -> Self {
        Self {
            zlib: Decompress::new(true),
        }
    }
}

impl Inflater {
    pub fn read(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, mut block: &[u8]) -> Result<Vec<u8>, HeaderError> {
        let fault = |error: flate2::DecompressError| HeaderError::Inflate(error.to_string());
        let mut out = Vec::new();
        let mut piece = [0; 1024];
        loop {
            let (taken, given) = (self.zlib.total_in(), self.zlib.total_out());
            let result = self
                .zlib
                .decompress(block, &mut piece, FlushDecompress::Sync);
            let taken = usize::try_from(self.zlib.total_in() - taken).unwrap_or(block.len());
            let given = usize::try_from(self.zlib.total_out() - given).unwrap_or(0);
            block = block.get(taken..).unwrap_or_default();
            out.extend_from_slice(piece.get(..given).unwrap_or_default());
            if out.len() > MAX_BLOCK {
                return Err(HeaderError::TooLarge);
            }
            match result {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.zlib.set_dictionary(DICTIONARY).map_err(fault)?;
                }
                Err(error) => return Err(fault(error)),
                Ok(Status::StreamEnd) => {
                    return Err(HeaderError::Inflate("the stream ended".to_owned()));
                }
                // Nothing taken and nothing given: all that there was is out.
                Ok(_) if given < piece.len() && (block.is_empty() || taken + given == 0) => {
                    break;
                }
                Ok(_) => {}
            }
        }
        if !block.is_empty() {
            return Err(HeaderError::Short);
        }
        Ok(out)
    }
}

/// The pairs of an inflated block.
pub fn parse(block: &[u8]) -> Result<Headers, HeaderError> {
    fn word(rest: &mut &[u8]) -> Result<usize, HeaderError> {
        let (word, after) = rest.split_first_chunk::<4>().ok_or(HeaderError::Short)?;
        *rest = after;
        Ok(u32::from_be_bytes(*word) as usize)
    }
    fn text(rest: &mut &[u8]) -> Result<String, HeaderError> {
        let len = word(rest)?;
        let (text, after) = rest.split_at_checked(len).ok_or(HeaderError::Short)?;
        *rest = after;
        let first = text.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8(first.to_owned()).map_err(|_| HeaderError::NotText)
    }
    let mut rest = block;
    let count = word(&mut rest)?;
    if count > MAX_PAIRS {
        return Err(HeaderError::TooMany);
    }
    let pairs = (0..count).map(|_| {
        let name = text(&mut rest)?.to_ascii_lowercase();
        Ok((name, text(&mut rest)?))
    });
    pairs.collect::<Result<_, _>>().map(Headers)
}

/// Writes the only block that a server has to say: that of no headers.
///
/// It is a zlib stream of stored blocks, which every inflater reads and which
/// needs no compressor: that would be a quarter MiB a connection, for four
/// zero bytes a stream.
#[derive(Default)]
pub struct EmptyBlocks {
    started: bool,
}

impl EmptyBlocks {
    /// zlib's header: deflate, a preset dictionary, and the Adler-32 of it.
    const START: [u8; 6] = [0x78, 0xf9, 0xe3, 0xc6, 0xa7, 0xc2];
    /// A stored block of four bytes, the number of pairs, zero; then an empty
    /// one, as every flush ends with: Go's inflater gives nothing out before.
    const BLOCK: [u8; 14] = [
        0x00, 0x04, 0x00, 0xfb, 0xff, 0, 0, 0, 0, // four
        0x00, 0x00, 0x00, 0xff, 0xff, // none
    ];

    pub fn next(&mut self) -> Vec<u8> {
        let start: &[u8] = if self.started { &[] } else { &Self::START };
        self.started = true;
        [start, &Self::BLOCK].concat()
    }
}

#[cfg(any(test, feature = "hostile"))]
pub mod testing {
    use flate2::{Compress, Compression, FlushCompress};

    use super::DICTIONARY;

    /// A client's side.
    pub struct Deflater(Compress);

    impl Deflater {
        pub fn new() -> Self {
            let mut zlib = Compress::new(Compression::best(), true);
            zlib.set_dictionary(DICTIONARY).expect("the dictionary");
            Self(zlib)
        }

        pub fn raw(&mut self, block: &[u8]) -> Vec<u8> {
            let mut out = Vec::with_capacity(block.len() + 1024);
            self.0
                .compress_vec(block, &mut out, FlushCompress::Sync)
                .expect("room for the block");
            out
        }

        pub fn block(&mut self, pairs: &[(&str, &str)]) -> Vec<u8> {
            self.raw(&plain(pairs))
        }
    }

    pub fn plain(pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut block = (pairs.len() as u32).to_be_bytes().to_vec();
        for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
            block.extend((text.len() as u32).to_be_bytes());
            block.extend(text.as_bytes());
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::testing::{Deflater, plain};
    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text
            .bytes()
            .map(|c| (c as char).to_digit(16).unwrap() as u8)
            .collect();
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    }

    /// Blocks as moby/spdystream wrote them, one after the other.
    #[test]
    fn blocks_of_a_real_client_are_read_in_one_context() {
        let mut inflater = Inflater::default();
        let blocks = [
            "78f9e3c6a7c26260606004a7b392a2d4c45c6851c29a0a0a6800000000ffff",
            "c22e555c92929907000000ffff",
        ];
        for (block, kind) in blocks.into_iter().zip(["error", "stdin"]) {
            let headers = inflater.read(&unhex(block)).unwrap();
            assert_eq!(
                headers,
                Headers(vec![("streamtype".to_owned(), kind.to_owned())])
            );
            assert_eq!(headers.get("streamtype"), Some(kind));
        }
        // Without what came before, the second means nothing.
        assert!(Inflater::default().read(&unhex(blocks[1])).is_err());
    }

    #[test]
    fn our_blocks_are_read_as_no_headers() {
        let mut ours = EmptyBlocks::default();
        let mut inflater = Inflater::default();
        for _ in 0..3 {
            let block = ours.next();
            assert!(block.ends_with(&[0, 0, 0, 0xff, 0xff]), "a flush");
            assert_eq!(inflater.read(&block), Ok(Headers::default()));
        }
    }

    #[test]
    fn a_bomb_ends_at_the_bound() {
        let mut deflater = Deflater::new();
        let bomb = deflater.raw(&vec![0; 8 << 20]);
        assert!(bomb.len() < 16 << 10, "{}", bomb.len());
        assert_eq!(Inflater::default().read(&bomb), Err(HeaderError::TooLarge));
    }

    #[test]
    fn lying_lengths_and_garbage_are_errors() {
        assert_eq!(parse(&[0, 0, 0]), Err(HeaderError::Short));
        assert_eq!(
            parse(&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]),
            Err(HeaderError::Short)
        );
        assert_eq!(parse(&[0xff; 4]), Err(HeaderError::TooMany));
        let mut not_text = plain(&[("a", "b")]);
        *not_text.last_mut().unwrap() = 0xff;
        assert_eq!(parse(&not_text), Err(HeaderError::NotText));
        assert!(Inflater::default().read(b"garbage").is_err());
    }

    proptest! {
        #[test]
        fn blocks_round_trip_through_one_context(
            blocks in proptest::collection::vec(
                proptest::collection::vec(("[a-z]{1,12}", "[ -~]{0,300}"), 0..20), 1..8),
        ) {
            let mut deflater = Deflater::new();
            let mut inflater = Inflater::default();
            for pairs in &blocks {
                let borrowed: Vec<_> = pairs.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
                let read = inflater.read(&deflater.block(&borrowed));
                prop_assert_eq!(read, Ok(Headers(pairs.clone())));
            }
        }

        #[test]
        fn no_block_makes_the_reader_panic(block in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&block);
            let _ = Inflater::default().read(&block);
            let start = [&EmptyBlocks::START[..], &block].concat();
            let _ = Inflater::default().read(&start);
        }
    }
}
