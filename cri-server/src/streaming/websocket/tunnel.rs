//! A tunnel: the payloads of binary messages, one after the other, are the
//! bytes of a connection (`SPDY/3.1+portforward.k8s.io`).

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, WriteHalf};

use super::connection::{Connection, Messages};
use super::frame;
use crate::streaming::PIECE;
use crate::streaming::outbox::Frame;

/// The inner connection. The outer one ends when this is dropped, and this
/// when the outer one ends.
pub fn tunnel<IO>(io: IO, idle: Duration) -> DuplexStream
where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    let (inner, ours) = tokio::io::duplex(2 * PIECE);
    let (mut from, to) = tokio::io::split(ours);
    let connection = Connection::start(io, idle, Inwards { to });
    tokio::spawn(async move {
        let gone = connection.gone().clone();
        let outwards = async {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(PIECE);
                // A duplex fails no read; zero is its end.
                let Ok(1..) = from.read_buf(&mut buffer).await else {
                    return true;
                };
                let data = buffer.split().freeze();
                let frame = Frame::with(frame::binary(&[], data.len()), data);
                if connection.outbox().data(frame).await.is_err() {
                    return false;
                }
            }
        };
        let finished = tokio::select! {
            () = gone.cancelled() => false,
            finished = outwards => finished,
        };
        if finished {
            connection.close().await;
        }
    });
    inner
}

struct Inwards {
    to: WriteHalf<DuplexStream>,
}

impl Messages for Inwards {
    async fn piece(&mut self, data: Bytes, _: bool) -> bool {
        // An inner connection that ended takes no more, which is no fault of
        // the client's: its goodbye is awaited.
        let _taken = self.to.write_all(&data).await.is_ok();
        true
    }
}
