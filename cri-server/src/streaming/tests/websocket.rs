//! A client's side of WebSocket.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;

use super::soon;
use crate::streaming::websocket::frame::testing::masked;

pub struct Client {
    pub io: TcpStream,
}

#[derive(Debug, PartialEq)]
pub enum Got {
    Binary(Vec<u8>),
    Pong(Vec<u8>),
    Close(u16),
}

impl Client {
    pub async fn frame(&mut self, first: u8, payload: &[u8]) {
        let frame = masked(first, payload);
        soon(self.io.write_all(&frame)).await.unwrap();
    }

    pub async fn message(&mut self, payload: &[u8]) {
        self.frame(0x82, payload).await;
    }

    /// `None` at the end of the connection.
    pub async fn next(&mut self) -> Option<Got> {
        let [first, len] = [
            soon(self.io.read_u8()).await.ok()?,
            self.io.read_u8().await.unwrap(),
        ];
        let len = match len {
            126 => self.io.read_u16().await.unwrap().into(),
            127 => self.io.read_u64().await.unwrap(),
            len => len.into(),
        };
        let mut payload = vec![0; len as usize];
        soon(self.io.read_exact(&mut payload)).await.unwrap();
        Some(match first {
            0x82 => Got::Binary(payload),
            0x8a => Got::Pong(payload),
            0x88 => Got::Close(u16::from_be_bytes([payload[0], payload[1]])),
            other => panic!("frame {other:#x}"),
        })
    }

    /// What comes on channels up to the goodbye, and its code.
    pub async fn rest(&mut self) -> (Vec<(u8, Vec<u8>)>, u16) {
        let mut messages = Vec::new();
        loop {
            match self.next().await {
                Some(Got::Binary(mut message)) => {
                    let channel = message.remove(0);
                    messages.push((channel, message));
                }
                Some(Got::Close(code)) => return (messages, code),
                other => panic!("{other:?}"),
            }
        }
    }

    /// The bytes within the messages.
    pub fn tunnel(mut self) -> DuplexStream {
        // Holds all answers of a client that first asks and then reads.
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(theirs);
            let mut buffer = [0; 512];
            loop {
                let mut start = [0];
                // Looks before it takes: a frame is read whole or not at all.
                tokio::select! {
                    len = read.read(&mut buffer) => match len {
                        Ok(len @ 1..) => self.message(&buffer[..len]).await,
                        _ => return,
                    },
                    _ = self.io.peek(&mut start) => match self.next().await {
                        Some(Got::Binary(data)) => {
                            if write.write_all(&data).await.is_err() {
                                return;
                            }
                        }
                        _ => return,
                    },
                }
            }
        });
        ours
    }
}
