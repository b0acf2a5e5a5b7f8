//! Raw streams between host and guest: the agent's second vsock port.
//!
//! The host opens one connection for each stream of a session (Exec, Attach)
//! and one for each forwarded port. It begins with a [`Hello`] of
//! [`HELLO_LEN`] bytes and is answered with one byte: [`ACCEPTED`] before raw
//! bytes, or [`REFUSED`] before a text of at most [`MAX_REFUSAL`] bytes and the
//! end. The end of a direction is the connection's own half-close. The answer
//! is more than the kernel's: that accepts before the agent does, and refuses
//! once too many wait for the agent.

/// The agent's port.
pub const STREAM_PORT: u32 = 1025;

pub const HELLO_LEN: usize = 20;
pub const TOKEN_LEN: usize = 16;
/// Names a session; known to the host alone.
pub type Token = [u8; TOKEN_LEN];

pub const ACCEPTED: u8 = 0;
pub const REFUSED: u8 = 1;
pub const MAX_REFUSAL: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    Stdin,
    Stdout,
    Stderr,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hello {
    Session {
        token: Token,
        stream: Stream,
    },
    /// A TCP port on the guest's loopback.
    Forward {
        port: u16,
    },
}

const SESSION: u8 = 1;
const FORWARD: u8 = 2;

impl Hello {
    /// Kind, stream, port (big endian), token.
    #[must_use]
    pub fn encode(self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        match self {
            Self::Session { token, stream } => {
                bytes[0] = SESSION;
                bytes[1] = stream as u8;
                bytes[4..].copy_from_slice(&token);
            }
            Self::Forward { port } => {
                bytes[0] = FORWARD;
                bytes[2..4].copy_from_slice(&port.to_be_bytes());
            }
        }
        bytes
    }

    /// None for what no host of ours sends.
    #[must_use]
    pub fn decode(bytes: &[u8; HELLO_LEN]) -> Option<Self> {
        let [kind, stream, high, low, token @ ..] = bytes;
        let port = u16::from_be_bytes([*high, *low]);
        match (*kind, *stream, port) {
            (SESSION, stream, 0) => {
                let stream = match stream {
                    0 => Stream::Stdin,
                    1 => Stream::Stdout,
                    2 => Stream::Stderr,
                    _ => return None,
                };
                let token = *token;
                Some(Self::Session { token, stream })
            }
            (FORWARD, 0, 1..) if *token == [0; TOKEN_LEN] => Some(Self::Forward { port }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_decodes_is_what_was_encoded(bytes: [u8; HELLO_LEN], kind in 0..4u8, stream in 0..4u8) {
            for bytes in [bytes, {
                let mut near = bytes;
                (near[0], near[1], near[2], near[3]) = (kind, stream, 0, 0);
                near
            }] {
                if let Some(hello) = Hello::decode(&bytes) {
                    prop_assert_eq!(hello.encode(), bytes);
                }
            }
        }

        #[test]
        fn every_hello_survives(token: Token, port in 1..u16::MAX) {
            for stream in [Stream::Stdin, Stream::Stdout, Stream::Stderr] {
                let hello = Hello::Session { token, stream };
                prop_assert_eq!(Hello::decode(&hello.encode()), Some(hello));
            }
            let hello = Hello::Forward { port };
            prop_assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        }
    }

    #[test]
    fn port_zero_is_nobodys() {
        assert_eq!(Hello::decode(&Hello::Forward { port: 0 }.encode()), None);
    }
}
