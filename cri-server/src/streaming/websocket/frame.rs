//! Frames: their headers and masks (RFC 6455, 5.2 and 5.3).

use bytes::Bytes;

/// Longest header of a client's frame: two bytes, a long length, a mask.
pub const MAX_HEADER_LEN: usize = 14;
/// Payload of a control frame.
pub const MAX_CONTROL_LEN: usize = 125;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Continuation,
    /// Text or binary: what a channel carries says its protocol.
    Message,
    Close,
    Ping,
    Pong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub last: bool,
    pub mask: [u8; 4],
    pub len: u64,
}

/// Why the connection is closed (7.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum CloseCode {
    Normal = 1000,
    ProtocolError = 1002,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame with reserved bits")]
    Reserved,
    #[error("a frame of unknown kind {0}")]
    Kind(u8),
    #[error("a frame without a mask")]
    Unmasked,
    #[error("a control frame that is long or in parts")]
    Control,
    #[error("a length beyond 2^63")]
    Length,
}

/// The header that `bytes` start with and its length; `None` when more bytes
/// are needed.
pub fn parse(bytes: &[u8]) -> Result<Option<(Header, usize)>, FrameError> {
    let Some(([first, second], rest)) = bytes.split_first_chunk::<2>() else {
        return Ok(None);
    };
    if first & 0x70 != 0 {
        return Err(FrameError::Reserved);
    }
    let kind = match first & 0x0f {
        0 => Kind::Continuation,
        1 | 2 => Kind::Message,
        8 => Kind::Close,
        9 => Kind::Ping,
        10 => Kind::Pong,
        other => return Err(FrameError::Kind(other)),
    };
    let last = first & 0x80 != 0;
    if second & 0x80 == 0 {
        return Err(FrameError::Unmasked);
    }
    let short = second & 0x7f;
    let control = matches!(kind, Kind::Close | Kind::Ping | Kind::Pong);
    if control && (!last || usize::from(short) > MAX_CONTROL_LEN) {
        return Err(FrameError::Control);
    }
    let length = match short {
        126 => rest
            .split_first_chunk::<2>()
            .map(|(len, rest)| (u16::from_be_bytes(*len).into(), rest)),
        127 => rest
            .split_first_chunk::<8>()
            .map(|(len, rest)| (u64::from_be_bytes(*len), rest)),
        len => Some((len.into(), rest)),
    };
    let Some((len, rest)) = length else {
        return Ok(None);
    };
    if len >> 63 != 0 {
        return Err(FrameError::Length);
    }
    let Some((mask, rest)) = rest.split_first_chunk::<4>() else {
        return Ok(None);
    };
    let header = Header {
        kind,
        last,
        mask: *mask,
        len,
    };
    Ok(Some((header, bytes.len() - rest.len())))
}

/// Takes the mask off `data`, which starts `offset` bytes into the payload.
pub fn unmask(data: &mut [u8], mask: [u8; 4], offset: u64) {
    let mut mask = mask;
    mask.rotate_left((offset % 4) as usize);
    let wide = u64::from_ne_bytes([
        mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3],
    ]);
    let (words, rest) = data.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

/// The start of a whole frame from us: its header for `prefix` and `len` more
/// bytes, and the prefix.
fn head(first: u8, prefix: &[u8], len: usize) -> Bytes {
    let len = prefix.len() + len;
    let mut head = Vec::with_capacity(MAX_HEADER_LEN);
    head.push(first);
    match (u8::try_from(len), u16::try_from(len)) {
        (Ok(len @ 0..=125), _) => head.push(len),
        (_, Ok(len)) => {
            head.push(126);
            head.extend(len.to_be_bytes());
        }
        _ => {
            head.push(127);
            head.extend((len as u64).to_be_bytes());
        }
    }
    head.extend(prefix);
    head.into()
}

pub fn binary(prefix: &[u8], len: usize) -> Bytes {
    head(0x82, prefix, len)
}

/// `payload` of at most [`MAX_CONTROL_LEN`].
pub fn pong(payload: &[u8]) -> Bytes {
    head(0x8a, payload, 0)
}

pub fn close(code: CloseCode) -> Bytes {
    head(0x88, &(code as u16).to_be_bytes(), 0)
}

#[cfg(any(test, feature = "hostile"))]
pub mod testing {
    use super::unmask;

    /// A frame as a client sends it.
    pub fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [0x11, 0x22, 0x33, 0x44];
        let mut frame = super::head(first, &[], payload.len()).to_vec();
        frame[1] |= 0x80;
        frame.extend(mask);
        let start = frame.len();
        frame.extend(payload);
        unmask(&mut frame[start..], mask, 0);
        frame
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::testing::masked;
    use super::*;

    #[test]
    fn the_examples_of_the_rfc() {
        let hello = [
            0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58,
        ];
        let (header, len) = parse(&hello).unwrap().unwrap();
        assert_eq!(
            (header.kind, header.last, header.len, len),
            (Kind::Message, true, 5, 6)
        );
        let mut payload = hello[len..].to_vec();
        unmask(&mut payload, header.mask, 0);
        assert_eq!(payload, b"Hello");
        assert_eq!(binary(&[], 256)[..], [0x82, 0x7e, 0x01, 0x00]);
        assert_eq!(
            binary(&[1], 65535)[..],
            [0x82, 0x7f, 0, 0, 0, 0, 0, 1, 0, 0, 1]
        );
        assert_eq!(close(CloseCode::Normal)[..], [0x88, 2, 0x03, 0xe8]);
    }

    #[test]
    fn what_no_client_may_send_is_refused() {
        let masked = |first, second| parse(&[first, second, 0, 0, 0, 0]).unwrap_err();
        assert_eq!(masked(0xc2, 0x80), FrameError::Reserved);
        assert_eq!(masked(0x83, 0x80), FrameError::Kind(3));
        assert_eq!(masked(0x82, 0x01), FrameError::Unmasked);
        assert_eq!(masked(0x09, 0x80), FrameError::Control, "a ping in parts");
        assert_eq!(masked(0x89, 0xfe), FrameError::Control, "a long ping");
        let long = [&[0x82, 0xff][..], &[0xff; 8], &[0; 4]].concat();
        assert_eq!(parse(&long), Err(FrameError::Length));
    }

    proptest! {
        #[test]
        fn what_is_masked_is_what_is_read(
            payload in proptest::collection::vec(any::<u8>(), 0..70_000), cut: prop::sample::Index,
        ) {
            let mut frame = masked(0x82, &payload);
            let (header, len) = parse(&frame).unwrap().unwrap();
            prop_assert_eq!(header.len, payload.len() as u64);
            for end in 0..len {
                prop_assert_eq!(parse(&frame[..end]), Ok(None));
            }
            let read = &mut frame[len..];
            let (a, b) = read.split_at_mut(cut.index(payload.len() + 1));
            unmask(a, header.mask, 0);
            unmask(b, header.mask, a.len() as u64);
            prop_assert_eq!(&frame[len..], &payload);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
            let _ = parse(&bytes);
        }
    }
}
