//! One stream, as the protocol above holds it.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::credit::{self, Credit};
use super::frame::{self, Reset};
use super::headers::{EmptyBlocks, Headers};
use super::window::{StreamWindow, Windows};
use crate::streaming::PIECE;
use crate::streaming::inbox::Inbox;
use crate::streaming::outbox::{Closed, Frame, Outbox};

/// What the streams of a connection have in common.
pub struct Shared {
    pub outbox: Outbox,
    pub windows: Windows,
    pub gone: CancellationToken,
    /// Locked until the block it gave is queued: blocks go out in order.
    pub blocks: Mutex<EmptyBlocks>,
    pub credit: Credit,
}

impl Shared {
    pub fn reset(&self, stream: u32, why: Reset) {
        // A client that no longer takes answers is being cut off already.
        if self
            .outbox
            .control(Frame::new(frame::reset(stream, why)))
            .is_err()
        {
            self.gone.cancel();
        }
    }

    pub fn consumed(&self, bytes: usize) {
        let bytes = self.credit.read(bytes);
        self.open_window(0, bytes);
    }

    fn open_window(&self, stream: u32, bytes: usize) {
        let delta = u32::try_from(bytes).unwrap_or(0).min(i32::MAX as u32);
        if delta == 0 || !self.credit.is_kept() {
            return;
        }
        let frame = Frame::new(frame::window_update(stream, delta));
        if self.outbox.control(frame).is_err() {
            self.gone.cancel();
        }
    }
}

/// A stream that the client opened. Dropped without [`Stream::reply`], it is
/// refused.
pub struct Stream {
    pub id: u32,
    pub headers: Headers,
    pub inbox: Inbox,
    pub sender: Sender,
}

impl Stream {
    /// Tells the client that the stream stands; nothing may be sent before.
    pub fn reply(&self) -> Result<(), Closed> {
        let shared = &self.sender.state.shared;
        let mut blocks = shared.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let frame = frame::syn_reply(self.id, &blocks.next());
        shared.outbox.control(Frame::new(frame))
    }
}

/// What both halves of a stream and the connection's reader know of it. It is
/// over, and its place free, when the last of them lets go of it.
pub struct State {
    pub id: u32,
    pub window: StreamWindow,
    /// Set by a reset from either side, and with the connection's end.
    pub over: CancellationToken,
    pub shared: Arc<Shared>,
    halves: Mutex<Halves>,
    _place: OwnedSemaphorePermit,
}

#[derive(Default)]
struct Halves {
    /// The client ended its half.
    ended: bool,
    /// We ended ours, and the frame is out.
    finished: bool,
    /// Nobody reads what the client sends.
    unread: bool,
}

impl State {
    pub fn new(id: u32, shared: Arc<Shared>, place: OwnedSemaphorePermit) -> Self {
        Self {
            id,
            window: StreamWindow::default(),
            over: shared.gone.child_token(),
            shared,
            halves: Mutex::default(),
            _place: place,
        }
    }

    pub fn ended(&self) {
        self.change(|halves| halves.ended = true);
    }

    /// A client that still has a stream open which nobody reads, and to which
    /// nothing more will be sent, is told to forget it.
    fn change(&self, change: impl FnOnce(&mut Halves)) {
        let mut halves = self.halves.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut halves);
        if halves.finished && halves.unread && !halves.ended {
            self.reset(Reset::Cancel);
        }
    }

    pub fn reset(&self, why: Reset) {
        if !self.over.is_cancelled() {
            self.over.cancel();
            self.shared.reset(self.id, why);
        }
    }
}

/// Lives in the inbox: counts what is taken out of it, and its drop says that
/// nobody reads the stream any more.
pub struct Reading {
    pub state: Arc<State>,
    credit: usize,
}

impl Reading {
    pub fn new(state: Arc<State>) -> Self {
        Self { state, credit: 0 }
    }

    pub fn taken(&mut self, bytes: usize) {
        self.state.shared.consumed(bytes);
        self.credit += bytes;
        if self.credit >= credit::STEP {
            self.state.shared.open_window(self.state.id, self.credit);
            self.credit = 0;
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.state.change(|halves| halves.unread = true);
    }
}

/// The half towards the client. Dropped without [`Sender::finish`], the stream
/// is reset.
pub struct Sender {
    state: Arc<State>,
    finished: bool,
}

impl Sender {
    pub fn new(state: Arc<State>) -> Self {
        Self {
            state,
            finished: false,
        }
    }

    pub async fn send(&mut self, mut data: Bytes) -> Result<(), Closed> {
        let state = &self.state;
        while !data.is_empty() {
            let wanted = data.len().min(PIECE);
            let sent = async {
                let len = state.shared.windows.take(&state.window, wanted).await;
                let head = frame::data(state.id, false, len);
                let frame = Frame::with(Bytes::copy_from_slice(&head), data.split_to(len));
                state.shared.outbox.data(frame).await
            };
            tokio::select! {
                biased;
                () = state.over.cancelled() => return Err(Closed),
                sent = sent => sent?,
            }
        }
        Ok(())
    }

    /// Half-close, after what was sent.
    pub async fn finish(mut self) -> Result<(), Closed> {
        let state = Arc::clone(&self.state);
        let mut frame = Frame::new(Bytes::copy_from_slice(&frame::data(state.id, true, 0)));
        let written = Arc::clone(&state);
        frame.written = Some(Box::new(move || {
            written.change(|halves| halves.finished = true);
        }));
        tokio::select! {
            biased;
            () = state.over.cancelled() => return Err(Closed),
            sent = state.shared.outbox.data(frame) => sent?,
        }
        self.finished = true;
        Ok(())
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if !self.finished {
            self.state.reset(Reset::Cancel);
        }
    }
}
