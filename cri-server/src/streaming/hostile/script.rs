//! What a script's bytes stand for.

use crate::streaming::session::{ExecRequest, PortForwardRequest, Wanted};
use crate::streaming::spdy::frame;
use crate::streaming::spdy::headers::testing::Deflater;
use crate::streaming::token::{Ticket, Tokens};
use crate::streaming::websocket::frame::testing::masked;

/// Frames and messages of one script.
const MOST: usize = 200;

/// A script being read. Past its end are zeroes.
pub struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    fn word(&mut self) -> u32 {
        u32::from_be_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// Up to `most` bytes of the script.
    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn piece(&mut self) -> &'a [u8] {
        let most = usize::from(self.byte());
        self.bytes(most)
    }

    fn choose<T: Copy, const N: usize>(&mut self, from: [T; N]) -> T {
        from[usize::from(self.byte()) % N]
    }

    /// A request in which `TOKEN` stands for one that is good.
    pub fn request(mut self, tokens: &Tokens) -> Vec<Vec<u8>> {
        let token = self.ticket(tokens);
        let mut text = Vec::new();
        while let Some(at) = self.0.windows(5).position(|five| five == b"TOKEN") {
            text.extend_from_slice(&self.0[..at]);
            text.extend_from_slice(token.as_bytes());
            self.0 = &self.0[at + 5..];
        }
        text.extend_from_slice(self.0);
        vec![text]
    }

    fn ticket(&mut self, tokens: &Tokens) -> String {
        if self.byte().is_multiple_of(2) {
            self.exec(tokens)
        } else {
            self.ports(tokens)
        }
    }

    fn exec(&mut self, tokens: &Tokens) -> String {
        let wanted = self.byte();
        let request = ExecRequest {
            container_id: "c".to_owned(),
            argv: vec![self.choose(["cat", "sizes", "sleep", "none"]).to_owned()],
            wanted: Wanted {
                tty: wanted & 1 != 0,
                stdin: wanted & 2 != 0,
                stdout: wanted & 4 == 0,
                stderr: wanted & 8 != 0,
            },
        };
        tokens.insert(Ticket::Exec(request)).unwrap_or_default()
    }

    fn ports(&mut self, tokens: &Tokens) -> String {
        let request = PortForwardRequest {
            pod_id: "p".to_owned(),
            ports: vec![80, self.byte().into()],
        };
        tokens
            .insert(Ticket::PortForward(request))
            .unwrap_or_default()
    }

    pub fn spdy(mut self, tokens: &Tokens) -> Vec<Vec<u8>> {
        let (path, protocol) = if self.byte().is_multiple_of(2) {
            let versions = ["v4.channel.k8s.io", "v2.channel.k8s.io"];
            let token = self.exec(tokens);
            (format!("exec/{token}"), self.choose(versions))
        } else {
            let token = self.ports(tokens);
            (format!("portforward/{token}"), "portforward.k8s.io")
        };
        let mut pieces = vec![head(
            &path,
            &[
                ("Upgrade", "SPDY/3.1"),
                ("X-Stream-Protocol-Version", protocol),
            ],
        )];
        let mut deflater = Deflater::new();
        while !self.0.is_empty() && pieces.len() < MOST {
            pieces.push(self.frame(&mut deflater));
        }
        pieces
    }

    /// A SPDY frame, or what is taken for one.
    fn frame(&mut self, deflater: &mut Deflater) -> Vec<u8> {
        let kind = self.byte();
        let stream = match self.byte() {
            255 => self.word(),
            near => near.into(),
        };
        let whole = |frame: bytes::Bytes| frame.to_vec();
        match kind % 12 {
            0..=3 => {
                let role = self.choose(["error", "stdin", "stdout", "stderr", "resize", "data"]);
                let port = self.choose(["80", "81", "0", "-1"]);
                let id = self.choose(["1", "2", "3", ""]);
                let headers = [("streamtype", role), ("port", port), ("requestid", id)];
                whole(frame::syn_stream(stream, &deflater.block(&headers)))
            }
            4 => whole(frame::syn_stream(stream, &deflater.raw(self.piece()))),
            5 | 6 => {
                let payload = self.piece();
                let mut data = frame::data(stream, kind & 16 != 0, payload.len()).to_vec();
                data.extend_from_slice(payload);
                data
            }
            7 => whole(frame::reset(stream, frame::Reset::Cancel)),
            8 => whole(frame::window_update(stream, self.word())),
            9 => whole(frame::settings(self.word())),
            10 => whole(frame::ping(self.word())),
            _ => self.piece().to_vec(),
        }
    }

    pub fn websocket(mut self, tokens: &Tokens) -> Vec<Vec<u8>> {
        let form = self.byte() % 4;
        let (path, protocol) = match form {
            0 => (format!("exec/{}", self.exec(tokens)), "v5.channel.k8s.io"),
            1 => (format!("exec/{}", self.exec(tokens)), "v4.channel.k8s.io"),
            2 => (
                format!("portforward/{}", self.ports(tokens)),
                "v4.channel.k8s.io",
            ),
            _ => (
                format!("portforward/{}", self.ports(tokens)),
                "SPDY/3.1+portforward.k8s.io",
            ),
        };
        let mut pieces = vec![head(
            &path,
            &[
                ("Upgrade", "websocket"),
                ("Sec-WebSocket-Version", "13"),
                ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
                ("Sec-WebSocket-Protocol", protocol),
            ],
        )];
        let mut deflater = Deflater::new();
        while !self.0.is_empty() && pieces.len() < MOST {
            let piece = match self.byte() % 8 {
                0 => self.piece().to_vec(),
                // Any kind of frame, in parts or with reserved bits.
                1 => masked(self.byte(), self.piece()),
                // The close of a channel.
                2 => masked(0x82, &[255, self.byte()]),
                _ if form == 3 => masked(0x82, &self.frame(&mut deflater)),
                _ => {
                    let channel = self.byte() % 6;
                    masked(0x82, &[&[channel], self.piece()].concat())
                }
            };
            pieces.push(piece);
        }
        pieces
    }
}

fn head(path: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut text = format!("POST /{path} HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    (text + "\r\n").into_bytes()
}
