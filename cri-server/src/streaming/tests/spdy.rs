//! A client's side of SPDY.

use std::collections::BTreeMap;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::soon;
use crate::streaming::spdy::frame::{self, Control, Header};
use crate::streaming::spdy::headers::{Inflater, testing::Deflater};

#[derive(Debug, PartialEq)]
pub enum Got {
    Reply(u32),
    Data(u32, Vec<u8>),
    Fin(u32),
    Reset(u32),
    Ping(u32),
    GoAway,
    WindowUpdate(u32, u32),
}

pub struct Client<IO> {
    pub io: IO,
    deflater: Deflater,
    inflater: Inflater,
    next: u32,
}

/// What came on each stream until the end.
#[derive(Debug, Default)]
pub struct All {
    pub data: BTreeMap<u32, Vec<u8>>,
    pub ended: Vec<u32>,
    pub reset: Vec<u32>,
    pub goodbye: bool,
}

impl All {
    pub fn text(&self, stream: u32) -> String {
        let data = self.data.get(&stream).cloned().unwrap_or_default();
        String::from_utf8(data).unwrap()
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Client<IO> {
    pub fn new(io: IO) -> Self {
        Self {
            io,
            deflater: Deflater::new(),
            inflater: Inflater::default(),
            next: 1,
        }
    }

    pub async fn send(&mut self, frame: impl AsRef<[u8]>) {
        soon(self.io.write_all(frame.as_ref())).await.unwrap();
    }

    /// Does not wait for the reply.
    pub async fn syn(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        let block = self.deflater.block(headers);
        self.send(frame::syn_stream(id, &block)).await;
        id
    }

    pub async fn open(&mut self, kind: &str) -> u32 {
        let id = self.syn(&[("streamtype", kind)]).await;
        assert_eq!(self.next().await, Some(Got::Reply(id)));
        id
    }

    pub async fn data(&mut self, stream: u32, data: &[u8]) {
        self.send([&frame::data(stream, false, data.len())[..], data].concat())
            .await;
    }

    pub async fn fin(&mut self, stream: u32) {
        self.send(frame::data(stream, true, 0)).await;
    }

    /// `None` at the end of the connection.
    pub async fn next(&mut self) -> Option<Got> {
        let mut header = [0; frame::HEADER_LEN];
        soon(self.io.read_exact(&mut header)).await.ok()?;
        let len = match frame::parse_header(&header).unwrap() {
            Header::Control { len, .. } | Header::Data { len, .. } => len,
        };
        let mut payload = vec![0; len];
        soon(self.io.read_exact(&mut payload)).await.unwrap();
        let got = match frame::parse_header(&header).unwrap() {
            Header::Data {
                stream, fin: true, ..
            } => Got::Fin(stream),
            Header::Data { stream, .. } => Got::Data(stream, payload),
            Header::Control { kind, flags, .. } => {
                match frame::parse_control(kind, flags, &payload).unwrap() {
                    Control::Headers { stream, block, .. } => {
                        self.inflater.read(block).unwrap();
                        Got::Reply(stream)
                    }
                    Control::Reset { stream } => Got::Reset(stream),
                    Control::Ping { id } => Got::Ping(id),
                    Control::GoAway => Got::GoAway,
                    Control::WindowUpdate { stream, delta } => Got::WindowUpdate(stream, delta),
                    other => panic!("{other:?}"),
                }
            }
        };
        Some(got)
    }

    /// Everything up to the server's end of the connection.
    pub async fn rest(&mut self) -> All {
        let mut all = All::default();
        while let Some(got) = self.next().await {
            all.add(got);
        }
        all
    }

    /// Everything until `streams` have ended.
    pub async fn until_ended(&mut self, streams: &[u32]) -> All {
        let mut all = All::default();
        while !streams.iter().all(|id| all.ended.contains(id)) {
            all.add(self.next().await.expect("more"));
        }
        all
    }
}

impl All {
    fn add(&mut self, got: Got) {
        match got {
            Got::Data(stream, data) => self.data.entry(stream).or_default().extend(data),
            Got::Fin(stream) => self.ended.push(stream),
            Got::Reset(stream) => self.reset.push(stream),
            Got::GoAway => self.goodbye = true,
            Got::Reply(_) | Got::Ping(_) | Got::WindowUpdate(..) => {}
        }
    }
}
