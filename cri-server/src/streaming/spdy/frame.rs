//! SPDY/3.1 frames (draft 3.1, 2.2 and 2.6).

use bytes::{BufMut, Bytes, BytesMut};

pub const HEADER_LEN: usize = 8;
/// Payload of a control frame; those of real clients are below 200 bytes.
pub const MAX_CONTROL_LEN: usize = 16 << 10;
/// Settings in one frame: the draft defines eight.
const MAX_SETTINGS: usize = 64;

const VERSION: u16 = 3;
const STREAM_MASK: u32 = 0x7fff_ffff;
const FLAG_FIN: u8 = 0x01;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

const SETTING_INITIAL_WINDOW: u32 = 7;

/// Why a stream is reset (2.6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reset {
    ProtocolError = 1,
    InvalidStream = 2,
    RefusedStream = 3,
    Cancel = 5,
    FlowControlError = 7,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    Control { kind: u16, flags: u8, len: usize },
    Data { stream: u32, fin: bool, len: usize },
}

/// A control frame's content; a header block is still compressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control<'a> {
    SynStream {
        stream: u32,
        fin: bool,
        block: &'a [u8],
    },
    /// Of SYN_REPLY and HEADERS: only their blocks matter, to keep the
    /// compression's state.
    Headers {
        stream: u32,
        fin: bool,
        block: &'a [u8],
    },
    Reset {
        stream: u32,
    },
    Settings {
        initial_window: Option<u32>,
    },
    Ping {
        id: u32,
    },
    GoAway,
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    /// Of a kind that this version does not know; to be skipped.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a control frame of SPDY version {0}")]
    Version(u16),
    #[error("a control frame of {0} bytes")]
    TooLong(usize),
    #[error("a control frame of kind {kind} cut off at {len} bytes")]
    Short { kind: u16, len: usize },
    #[error("data on stream 0")]
    StreamZero,
    #[error("a SETTINGS frame of {0} entries")]
    Settings(usize),
}

pub fn parse_header(bytes: &[u8; HEADER_LEN]) -> Result<Header, FrameError> {
    let [a, b, c, d, flags, e, f, g] = *bytes;
    let len = u32::from_be_bytes([0, e, f, g]) as usize;
    if a & 0x80 == 0 {
        let stream = u32::from_be_bytes([a, b, c, d]);
        if stream == 0 {
            return Err(FrameError::StreamZero);
        }
        return Ok(Header::Data {
            stream,
            fin: flags & FLAG_FIN != 0,
            len,
        });
    }
    let version = u16::from_be_bytes([a & 0x7f, b]);
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    if len > MAX_CONTROL_LEN {
        return Err(FrameError::TooLong(len));
    }
    Ok(Header::Control {
        kind: u16::from_be_bytes([c, d]),
        flags,
        len,
    })
}

pub fn parse_control(kind: u16, flags: u8, payload: &[u8]) -> Result<Control<'_>, FrameError> {
    let short = FrameError::Short {
        kind,
        len: payload.len(),
    };
    let word = |index: usize| -> Option<u32> {
        let bytes = payload.get(4 * index..4 * index + 4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    let stream = |index| word(index).map(|id| id & STREAM_MASK);
    let fin = flags & FLAG_FIN != 0;
    let parsed = match kind {
        SYN_STREAM => stream(0)
            .zip(payload.get(10..))
            .map(|(stream, block)| Control::SynStream { stream, fin, block }),
        SYN_REPLY | HEADERS => stream(0)
            .zip(payload.get(4..))
            .map(|(stream, block)| Control::Headers { stream, fin, block }),
        RST_STREAM => word(1)
            .and(stream(0))
            .map(|stream| Control::Reset { stream }),
        SETTINGS => return parse_settings(payload).ok_or(short)?,
        PING => word(0).map(|id| Control::Ping { id }),
        GOAWAY => word(1).map(|_| Control::GoAway),
        WINDOW_UPDATE => stream(0)
            .zip(stream(1))
            .map(|(stream, delta)| Control::WindowUpdate { stream, delta }),
        _ => Some(Control::Unknown),
    };
    parsed.ok_or(short)
}

/// `None` when the frame is cut off.
fn parse_settings(payload: &[u8]) -> Option<Result<Control<'static>, FrameError>> {
    let (count, entries) = payload.split_first_chunk::<4>()?;
    let count = u32::from_be_bytes(*count) as usize;
    if count > MAX_SETTINGS {
        return Some(Err(FrameError::Settings(count)));
    }
    let entries = entries.get(..count * 8)?;
    let mut initial_window = None;
    for entry in entries.chunks_exact(8) {
        let [_flags, a, b, c, value @ ..] = entry else {
            return None;
        };
        if u32::from_be_bytes([0, *a, *b, *c]) == SETTING_INITIAL_WINDOW {
            initial_window = Some(u32::from_be_bytes(value.try_into().ok()?) & STREAM_MASK);
        }
    }
    Some(Ok(Control::Settings { initial_window }))
}

/// The header of a data frame; the payload, less than 16 MiB, follows it.
pub fn data(stream: u32, fin: bool, len: usize) -> [u8; HEADER_LEN] {
    let [a, b, c, d] = (stream & STREAM_MASK).to_be_bytes();
    let [_, e, f, g] = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    [a, b, c, d, if fin { FLAG_FIN } else { 0 }, e, f, g]
}

fn control(kind: u16, flags: u8, words: &[u32], block: &[u8]) -> Bytes {
    let len = 4 * words.len() + block.len();
    let mut frame = BytesMut::with_capacity(HEADER_LEN + len);
    frame.put_u16(0x8000 | VERSION);
    frame.put_u16(kind);
    frame.put_u8(flags);
    // Ours are short: all but the block is fixed, and that is of a few bytes.
    frame.put_uint(len as u64, 3);
    words.iter().for_each(|word| frame.put_u32(*word));
    frame.put_slice(block);
    frame.freeze()
}

pub fn syn_reply(stream: u32, block: &[u8]) -> Bytes {
    control(SYN_REPLY, 0, &[stream], block)
}

pub fn reset(stream: u32, why: Reset) -> Bytes {
    control(RST_STREAM, 0, &[stream, why as u32], &[])
}

pub fn ping(id: u32) -> Bytes {
    control(PING, 0, &[id], &[])
}

pub fn go_away(last_stream: u32) -> Bytes {
    control(GOAWAY, 0, &[last_stream, 0], &[])
}

pub fn window_update(stream: u32, delta: u32) -> Bytes {
    control(WINDOW_UPDATE, 0, &[stream, delta], &[])
}

#[cfg(any(test, feature = "hostile"))]
pub fn syn_stream(stream: u32, block: &[u8]) -> Bytes {
    let rest = [&[0, 0][..], block].concat();
    control(SYN_STREAM, 0, &[stream, 0], &rest)
}

#[cfg(any(test, feature = "hostile"))]
pub fn settings(initial_window: u32) -> Bytes {
    control(
        SETTINGS,
        0,
        &[1, SETTING_INITIAL_WINDOW, initial_window],
        &[],
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(frame: &[u8]) -> Result<Control<'_>, FrameError> {
        let (header, payload) = frame.split_first_chunk().unwrap();
        match parse_header(header)? {
            Header::Control { kind, flags, len } => {
                assert_eq!(len, payload.len());
                parse_control(kind, flags, payload)
            }
            Header::Data { .. } => panic!("data"),
        }
    }

    /// As moby/spdystream writes them.
    #[test]
    fn frames_are_the_bytes_that_others_write() {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(&data(3, false, 2)), "0000000300000002");
        assert_eq!(hex(&data(3, true, 0)), "0000000301000000");
        assert_eq!(
            hex(&reset(3, Reset::Cancel)),
            "80030003000000080000000300000005"
        );
        assert_eq!(hex(&ping(1)), "800300060000000400000001");
        assert_eq!(hex(&go_away(5)), "80030007000000080000000500000000");
        assert_eq!(
            hex(&window_update(3, 65536)),
            "80030009000000080000000300010000"
        );
    }

    #[test]
    fn what_is_cut_off_or_too_long_is_an_error() {
        let header = |text: [u8; 8]| parse_header(&text);
        assert_eq!(header([0; 8]), Err(FrameError::StreamZero));
        assert_eq!(
            header([0x80, 2, 0, 1, 0, 0, 0, 0]),
            Err(FrameError::Version(2))
        );
        assert_eq!(
            header([0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]),
            Err(FrameError::TooLong(0xff_ffff))
        );
        for kind in [
            SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, 9,
        ] {
            assert!(parse_control(kind, 0, &[0; 3]).is_err(), "{kind}");
        }
        let lying = [0, 0, 0, 2, 0, 0, 0, 7, 0, 0, 0, 1];
        assert!(parse_control(SETTINGS, 0, &lying).is_err());
        let many = [0xff; 4];
        assert!(matches!(
            parse_control(SETTINGS, 0, &many),
            Err(FrameError::Settings(_))
        ));
        assert_eq!(parse_control(5, 0, &[]), Ok(Control::Unknown));
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_is_read(
            stream in 1..=STREAM_MASK, word in 0..=STREAM_MASK, fin: bool,
            len in 0usize..1 << 24, block: [u8; 9],
        ) {
            prop_assert_eq!(
                parse_header(&data(stream, fin, len)),
                Ok(Header::Data { stream, fin, len })
            );
            let reads = |frame: Bytes, as_: Control<'_>| parse(&frame) == Ok(as_);
            let delta = word;
            assert!(reads(
                window_update(stream, delta),
                Control::WindowUpdate { stream, delta }
            ));
            assert!(reads(ping(word), Control::Ping { id: word }));
            assert!(reads(reset(stream, Reset::Cancel), Control::Reset { stream }));
            let initial_window = Some(word);
            assert!(reads(settings(word), Control::Settings { initial_window }));
            let (fin, block) = (false, &block[..]);
            assert!(reads(
                syn_stream(stream, block),
                Control::SynStream { stream, fin, block }
            ));
            assert!(reads(
                syn_reply(stream, block),
                Control::Headers { stream, fin, block }
            ));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(
            header: [u8; 8], kind in 0u16..12, flags: u8,
            payload in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let _ = parse_header(&header);
            let _ = parse_control(kind, flags, &payload);
        }
    }
}
