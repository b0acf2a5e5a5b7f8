//! Frames on their way to the client: one task a connection writes them.
//!
//! Data waits in a queue of a few frames, so that whoever produces it is held
//! up by a slow client. Small answers of the connection itself (PING, resets)
//! go first and never hold up the reader; a client that lets them pile up is
//! cut off.

use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::activity::Activity;

/// Data frames that wait, each of one piece.
const DATA_FRAMES: usize = 4;
/// Answers that wait. Real clients have a handful.
const CONTROL_FRAMES: usize = 1024;

/// One frame as it goes over the wire.
#[derive(Default)]
pub struct Frame {
    pub head: Bytes,
    pub payload: Bytes,
    /// Called when the frame was written.
    pub written: Option<Box<dyn FnOnce() + Send>>,
    /// Nothing is written after it: the writing side of the connection closes.
    pub last: bool,
}

impl Frame {
    pub fn new(head: impl Into<Bytes>) -> Self {
        Self {
            head: head.into(),
            ..Self::default()
        }
    }

    pub fn with(head: impl Into<Bytes>, payload: Bytes) -> Self {
        Self {
            head: head.into(),
            payload,
            ..Self::default()
        }
    }

    pub fn last(mut self) -> Self {
        self.last = true;
        self
    }
}

/// The connection writes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

#[derive(Clone)]
pub struct Outbox {
    control: mpsc::Sender<Frame>,
    data: mpsc::Sender<Frame>,
}

impl Outbox {
    /// Starts to write to `io`. `gone` ends it at once, and is set when the
    /// client cannot be written to.
    pub fn start<W>(io: W, gone: CancellationToken, activity: Arc<Activity>) -> Self
    where
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let (control, control_frames) = mpsc::channel(CONTROL_FRAMES);
        let (data, data_frames) = mpsc::channel(DATA_FRAMES);
        tokio::spawn(async move {
            let written = write(io, control_frames, data_frames, &activity);
            tokio::select! {
                () = gone.cancelled() => {}
                result = written => if let Err(error) = result {
                    tracing::debug!(%error, "a streaming client cannot be written to");
                    gone.cancel();
                }
            }
        });
        Self { control, data }
    }

    /// Never waits. Fails when the client has let too much pile up, or is gone.
    pub fn control(&self, frame: Frame) -> Result<(), Closed> {
        self.control.try_send(frame).map_err(|_| Closed)
    }

    /// Waits for the client to take what was sent before.
    pub async fn data(&self, frame: Frame) -> Result<(), Closed> {
        self.data.send(frame).await.map_err(|_| Closed)
    }

    /// Resolves when the last frame was written, or cannot be.
    pub async fn closed(&self) {
        self.data.closed().await;
    }
}

async fn write<W: AsyncWrite + Unpin>(
    mut io: W,
    mut control: mpsc::Receiver<Frame>,
    mut data: mpsc::Receiver<Frame>,
    activity: &Activity,
) -> std::io::Result<()> {
    loop {
        let frame = tokio::select! {
            biased;
            Some(frame) = control.recv() => frame,
            Some(frame) = data.recv() => frame,
            else => return Ok(()),
        };
        io.write_all_buf(&mut frame.head.chain(frame.payload))
            .await?;
        activity.touch();
        if let Some(written) = frame.written {
            written();
        }
        if frame.last {
            io.flush().await?;
            return io.shutdown().await;
        }
        if control.is_empty() && data.is_empty() {
            io.flush().await?;
        }
    }
}
