//! A connection: its reader hands messages on in pieces and answers pings.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::frame::{self, CloseCode, FrameError, Kind};
use crate::streaming::PIECE;
use crate::streaming::activity::Activity;
use crate::streaming::outbox::{Frame, Outbox};

const READ_BUFFER: usize = 64 << 10;
/// To write the answer to a client's goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// Takes messages, piece by piece.
pub trait Messages: Send + 'static {
    /// `last` is the message's last piece; it may be empty. `false` when the
    /// client broke the protocol.
    fn piece(&mut self, data: Bytes, last: bool) -> impl Future<Output = bool> + Send;
}

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("cannot read")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("a message begins within another, or goes on where none began")]
    Sequence,
    #[error("a message that the protocol does not know")]
    Message,
    #[error("the client takes no answers")]
    Flooded,
}

/// Dropping it cuts the client off; [`Connection::close`] says goodbye.
pub struct Connection {
    outbox: Outbox,
    gone: CancellationToken,
    idle: Duration,
    _gone_on_drop: DropGuard,
}

impl Connection {
    pub fn start<IO>(io: IO, idle: Duration, messages: impl Messages) -> Self
    where
        IO: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (from, to) = tokio::io::split(io);
        let activity = Arc::new(Activity::new(idle));
        let gone = CancellationToken::new();
        let outbox = Outbox::start(to, gone.clone(), Arc::clone(&activity));
        let reader = Reader {
            from,
            buffer: BytesMut::new(),
            outbox: outbox.clone(),
            activity: Arc::clone(&activity),
            within_message: false,
        };
        let ended = gone.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = activity.idle() => tracing::debug!("a streaming client was idle too long"),
                () = reader.run(messages) => {}
            }
            ended.cancel();
        });
        Self {
            outbox,
            _gone_on_drop: gone.clone().drop_guard(),
            gone,
            idle,
        }
    }

    /// Set when the client is gone, idle for too long, or talks nonsense.
    pub fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Sends what is left and then waits for the client to hang up: closing
    /// first, with something from it unread, would take from it what it has
    /// not read yet.
    pub async fn close(self) {
        let goodbye = Frame::new(frame::close(CloseCode::Normal)).last();
        let farewell = async {
            if self.outbox.data(goodbye).await.is_ok() {
                self.outbox.closed().await;
                // Ends with `gone` or not at all.
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = self.gone.cancelled() => {}
            () = tokio::time::sleep(self.idle) => {}
            () = farewell => {}
        }
    }
}

struct Reader<R> {
    from: R,
    buffer: BytesMut,
    outbox: Outbox,
    activity: Arc<Activity>,
    within_message: bool,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    async fn run(mut self, mut messages: impl Messages) {
        let code = match self.read(&mut messages).await {
            Ok(()) => CloseCode::Normal,
            Err(ReadError::Io(error)) => {
                tracing::debug!(%error, "a WebSocket client is gone");
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "a WebSocket connection ends");
                CloseCode::ProtocolError
            }
        };
        // What it meant for standard input is over; the answer is for form.
        drop(messages);
        let goodbye = Frame::new(frame::close(code)).last();
        if self.outbox.control(goodbye).is_ok() {
            let written = tokio::time::timeout(GOODBYE, self.outbox.closed()).await;
            tracing::trace!(written = written.is_ok(), "answered a goodbye");
        }
    }

    /// Returns when the client says goodbye.
    async fn read(&mut self, messages: &mut impl Messages) -> Result<(), ReadError> {
        loop {
            let header = loop {
                match frame::parse(&self.buffer)? {
                    Some((header, len)) => {
                        bytes::Buf::advance(&mut self.buffer, len);
                        break header;
                    }
                    None => self.more().await?,
                }
            };
            match header.kind {
                Kind::Message | Kind::Continuation => {
                    if self.within_message != (header.kind == Kind::Continuation) {
                        return Err(ReadError::Sequence);
                    }
                    self.within_message = !header.last;
                    self.message(header, messages).await?;
                }
                Kind::Close | Kind::Ping | Kind::Pong => {
                    // At most MAX_CONTROL_LEN, or it would not have parsed.
                    let len = usize::try_from(header.len).map_err(|_| ReadError::Message)?;
                    while self.buffer.len() < len {
                        self.more().await?;
                    }
                    let mut payload = self.buffer.split_to(len);
                    frame::unmask(&mut payload, header.mask, 0);
                    match header.kind {
                        Kind::Close => return Ok(()),
                        Kind::Ping => self
                            .outbox
                            .control(Frame::new(frame::pong(&payload)))
                            .map_err(|_| ReadError::Flooded)?,
                        _ => {}
                    }
                }
            }
        }
    }

    async fn message(
        &mut self,
        header: frame::Header,
        messages: &mut impl Messages,
    ) -> Result<(), ReadError> {
        let mut offset = 0;
        loop {
            let left = header.len - offset;
            if left > 0 && self.buffer.is_empty() {
                self.more().await?;
            }
            let here = self.buffer.len().min(PIECE);
            let len = here.min(usize::try_from(left).unwrap_or(here));
            // A copy, for a small piece must not keep a large buffer.
            let mut piece = BytesMut::from(self.buffer.get(..len).unwrap_or_default());
            bytes::Buf::advance(&mut self.buffer, len);
            frame::unmask(&mut piece, header.mask, offset);
            offset += len as u64;
            let ends = offset == header.len;
            if !messages.piece(piece.freeze(), ends && header.last).await {
                return Err(ReadError::Message);
            }
            if ends {
                return Ok(());
            }
        }
    }

    async fn more(&mut self) -> Result<(), ReadError> {
        self.buffer.reserve(READ_BUFFER);
        if self.from.read_buf(&mut self.buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.activity.touch();
        Ok(())
    }
}
