//! The connection below gRPC: what comes of the guest is paid from its budget,
//! frame by frame, before anything makes sense of it.
//!
//! HTTP/2 (RFC 9113) has frames that cost their receiver an answer and say
//! nothing: PING, SETTINGS, WINDOW_UPDATE and those of extensions. An agent
//! sends a few of them for each answer; one that sends them alone is cut off.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::{Sleep, sleep};

use super::budget::Budget;

/// What a frame costs beside its bytes: as long as it takes to handle one, so
/// many can be copied.
const FRAME_COST: u64 = 512;
/// Frames in a row that belong to no answer.
const MAX_CONTROL_FRAMES: u32 = 256;

const HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Flood {
    #[error("the agent sends HTTP/2 control frames and nothing else")]
    Control,
    /// The daemon sends no pings.
    #[error("the agent answers a ping that nobody sent")]
    Pong,
}

/// Finds the frames in a stream that comes in pieces.
#[derive(Debug, Default)]
pub(super) struct Frames {
    head: [u8; HEAD],
    read: usize,
    /// Of the payload that follows.
    left: usize,
    control: u32,
}

impl Frames {
    /// Returns what the next bytes of the stream cost.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<u64, Flood> {
        let mut cost = bytes.len() as u64;
        while !bytes.is_empty() {
            if self.left > 0 {
                let skipped = self.left.min(bytes.len());
                self.left -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            let taken = (HEAD - self.read).min(bytes.len());
            self.head[self.read..self.read + taken].copy_from_slice(&bytes[..taken]);
            self.read += taken;
            bytes = &bytes[taken..];
            if self.read == HEAD {
                self.read = 0;
                cost += FRAME_COST;
                self.begin()?;
            }
        }
        Ok(cost)
    }

    fn begin(&mut self) -> Result<(), Flood> {
        let [high, middle, low, kind, flags, ..] = self.head;
        self.left = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        match kind {
            DATA | HEADERS | CONTINUATION => self.control = 0,
            PING if flags & ACK != 0 => return Err(Flood::Pong),
            _ => self.control += 1,
        }
        if self.control > MAX_CONTROL_FRAMES {
            return Err(Flood::Control);
        }
        Ok(())
    }
}

pub(super) struct Link {
    stream: UnixStream,
    frames: Frames,
    budget: Arc<Budget>,
    /// Until then nothing is read.
    pause: Option<Pin<Box<Sleep>>>,
}

impl Link {
    pub(super) fn new(stream: UnixStream, budget: Arc<Budget>) -> Self {
        Self {
            stream,
            frames: Frames::default(),
            budget,
            pause: None,
        }
    }
}

impl AsyncRead for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(context));
            self.pause = None;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let cost = self.frames.take(&buffer.filled()[before..]);
        let cost = cost.map_err(|flood| io::Error::new(io::ErrorKind::InvalidData, flood))?;
        let wait = self.budget.spend_link(cost);
        if !wait.is_zero() {
            self.pause = Some(Box::pin(sleep(wait)));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Link {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
        let [.., high, middle, low] = length.to_be_bytes();
        let mut bytes = vec![high, middle, low, kind, flags, 0, 0, 0, 1];
        bytes.resize(HEAD + length, 0xff);
        bytes
    }

    #[test]
    fn control_frames_alone_are_cut_off_and_beside_answers_are_not() {
        const SETTINGS: u8 = 4;
        let mut frames = Frames::default();
        for _ in 0..10 * MAX_CONTROL_FRAMES {
            frames.take(&frame(SETTINGS, 0, 6)).unwrap();
            frames.take(&frame(DATA, 0, 100)).unwrap();
        }
        let ping = frame(PING, 0, 8);
        let mut taken = 0;
        while frames.take(&ping).is_ok() {
            taken += 1;
        }
        assert_eq!(taken, MAX_CONTROL_FRAMES);
        let pong = Frames::default().take(&frame(PING, ACK, 8));
        assert_eq!(pong, Err(Flood::Pong));
    }

    proptest! {
        #[test]
        fn pieces_cost_what_the_whole_does(
            all in prop::collection::vec((0..10u8, 0..2u8, 0..600usize), 0..20),
            cuts in prop::collection::vec(1..300usize, 1..40),
        ) {
            let all = all.into_iter().filter(|(kind, flags, _)| (*kind, *flags) != (PING, ACK));
            let bytes: Vec<u8> = all.flat_map(|(kind, flags, length)| frame(kind, flags, length)).collect();
            let whole = Frames::default().take(&bytes).unwrap();
            let (mut frames, mut sum, mut rest) = (Frames::default(), 0, &bytes[..]);
            let mut cuts = cuts.into_iter().cycle();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                sum += frames.take(piece).unwrap();
                rest = after;
            }
            prop_assert_eq!(sum, whole);
        }
    }
}
