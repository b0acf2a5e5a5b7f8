//! A connection: its reader takes frames apart and feeds the streams.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::credit::Credit;
use super::frame::{self, Control, FrameError, HEADER_LEN, Header, Reset};
use super::headers::{EmptyBlocks, HeaderError, Inflater};
use super::stream::{Reading, Sender, Shared, State, Stream};
use super::window::{Overflow, Windows};
use crate::streaming::PIECE;
use crate::streaming::activity::Activity;
use crate::streaming::inbox::{Budget, InboxSender, inbox};
use crate::streaming::outbox::{Frame, Outbox};

/// Streams open at once: two for each forwarded connection.
const MAX_STREAMS: usize = 4096;
/// Streams that the client opened and the protocol did not look at yet.
const UNSEEN_STREAMS: usize = 64;
const READ_BUFFER: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("cannot read")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Headers(#[from] HeaderError),
    #[error("the connection's window was opened too far")]
    Window,
    #[error("the client takes no answers")]
    Flooded,
}

/// Dropping it cuts the client off; [`Connection::close`] says goodbye.
pub struct Connection {
    opened: mpsc::Receiver<Stream>,
    outbox: Outbox,
    gone: CancellationToken,
    last_stream: Arc<AtomicU32>,
    idle: Duration,
    _gone_on_drop: DropGuard,
}

impl Connection {
    pub fn start<IO>(io: IO, idle: Duration) -> Self
    where
        IO: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (from, to) = tokio::io::split(io);
        let activity = Arc::new(Activity::new(idle));
        let gone = CancellationToken::new();
        let outbox = Outbox::start(to, gone.clone(), Arc::clone(&activity));
        let (streams, opened) = mpsc::channel(UNSEEN_STREAMS);
        let last_stream = Arc::new(AtomicU32::new(0));
        let reader = Reader {
            from,
            buffer: BytesMut::new(),
            inflater: Inflater::default(),
            streams: HashMap::new(),
            opened: streams,
            budget: Budget::default(),
            places: Arc::new(Semaphore::new(MAX_STREAMS)),
            last_stream: Arc::clone(&last_stream),
            activity: Arc::clone(&activity),
            shared: Arc::new(Shared {
                outbox: outbox.clone(),
                windows: Windows::default(),
                gone: gone.clone(),
                blocks: Mutex::new(EmptyBlocks::default()),
                credit: Credit::default(),
            }),
        };
        let ended = gone.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = activity.idle() => tracing::debug!("a streaming client was idle too long"),
                result = reader.run() => if let Err(error) = result {
                    tracing::debug!(%error, "a SPDY connection ends");
                }
            }
            ended.cancel();
        });
        Self {
            opened,
            outbox,
            _gone_on_drop: gone.clone().drop_guard(),
            gone,
            last_stream,
            idle,
        }
    }

    /// Set when the client is gone, idle for too long, or talks nonsense.
    pub fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// The next stream that the client opens; `None` when it is gone.
    pub async fn accept(&mut self) -> Option<Stream> {
        tokio::select! {
            () = self.gone.cancelled() => None,
            stream = self.opened.recv() => stream,
        }
    }

    /// From now on streams are refused.
    pub fn refuse_more(&mut self) {
        self.opened.close();
        while let Ok(stream) = self.opened.try_recv() {
            drop(stream);
        }
    }

    /// Sends what is left and then waits for the client to hang up: closing
    /// first, with something from it unread, would take from it what it has
    /// not read yet.
    pub async fn close(mut self) {
        self.refuse_more();
        let goodbye = frame::go_away(self.last_stream.load(Ordering::Relaxed));
        let farewell = async {
            if self.outbox.data(Frame::new(goodbye).last()).await.is_ok() {
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

struct Entry {
    /// Until the client ends its half.
    inbox: Option<InboxSender>,
    state: Weak<State>,
}

struct Reader<R> {
    from: R,
    buffer: BytesMut,
    inflater: Inflater,
    streams: HashMap<u32, Entry>,
    opened: mpsc::Sender<Stream>,
    budget: Budget,
    places: Arc<Semaphore>,
    last_stream: Arc<AtomicU32>,
    activity: Arc<Activity>,
    shared: Arc<Shared>,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Returns when the client has closed the connection.
    async fn run(mut self) -> Result<(), ReadError> {
        loop {
            let header = match self.exactly(HEADER_LEN).await {
                Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(());
                }
                header => header?,
            };
            let header = header.first_chunk().ok_or(ReadError::Flooded)?;
            match frame::parse_header(header)? {
                Header::Data { stream, fin, len } => self.data(stream, fin, len).await?,
                Header::Control { kind, flags, len } => {
                    let payload = self.exactly(len).await?;
                    self.control(frame::parse_control(kind, flags, &payload)?)
                        .await?;
                }
            }
        }
    }

    async fn exactly(&mut self, len: usize) -> Result<Bytes, ReadError> {
        while self.buffer.len() < len {
            self.more().await?;
        }
        Ok(self.buffer.split_to(len).freeze())
    }

    async fn more(&mut self) -> Result<(), ReadError> {
        self.buffer.reserve(READ_BUFFER);
        if self.from.read_buf(&mut self.buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.activity.touch();
        Ok(())
    }

    async fn data(&mut self, id: u32, fin: bool, mut left: usize) -> Result<(), ReadError> {
        self.shared.credit.received(left);
        // Of a stream that was open once, data may be under way still.
        let unknown = id > self.last_stream.load(Ordering::Relaxed);
        if unknown {
            self.shared.reset(id, Reset::InvalidStream);
        }
        while left > 0 {
            if self.buffer.is_empty() {
                self.more().await?;
            }
            let len = left.min(self.buffer.len()).min(PIECE);
            left -= len;
            let inbox = self.streams.get(&id).and_then(|entry| entry.inbox.as_ref());
            let taken = match inbox {
                // A copy, for a small piece must not keep a large buffer.
                Some(inbox) => {
                    let piece = Bytes::copy_from_slice(self.buffer.get(..len).unwrap_or_default());
                    inbox.send(piece).await
                }
                None => false,
            };
            if !taken {
                self.shared.consumed(len);
            }
            self.buffer.advance(len);
        }
        if fin {
            self.end(id);
        }
        Ok(())
    }

    fn end(&mut self, id: u32) {
        if let Some(entry) = self.streams.get_mut(&id) {
            if let Some(state) = entry.state.upgrade() {
                state.ended();
            }
            if let Some(inbox) = entry.inbox.take() {
                inbox.end();
            }
        }
    }

    async fn control(&mut self, control: Control<'_>) -> Result<(), ReadError> {
        match control {
            Control::SynStream { stream, fin, block } => self.open(stream, fin, block).await,
            Control::Headers { stream, fin, block } => {
                self.inflater.read(block)?;
                if fin {
                    self.end(stream);
                }
                Ok(())
            }
            Control::Reset { stream } => {
                if let Some(entry) = self.streams.remove(&stream)
                    && let Some(state) = entry.state.upgrade()
                {
                    state.over.cancel();
                }
                Ok(())
            }
            Control::Settings { initial_window } => {
                if let Some(initial) = initial_window {
                    self.shared.windows.set_initial(initial);
                }
                Ok(())
            }
            // Odd ones are the client's, even ones answers.
            Control::Ping { id } if id % 2 == 1 => self
                .shared
                .outbox
                .control(Frame::new(frame::ping(id)))
                .map_err(|_| ReadError::Flooded),
            Control::WindowUpdate { stream: 0, delta } => self
                .shared
                .windows
                .open_connection(delta)
                .map_err(|Overflow| ReadError::Window),
            Control::WindowUpdate { stream, delta } => {
                let state = self.streams.get(&stream).map(|entry| &entry.state);
                if let Some(state) = state.and_then(Weak::upgrade)
                    && let Err(Overflow) = self.shared.windows.open_stream(&state.window, delta)
                {
                    state.reset(Reset::FlowControlError);
                }
                Ok(())
            }
            Control::Ping { .. } | Control::GoAway | Control::Unknown => Ok(()),
        }
    }

    async fn open(&mut self, id: u32, fin: bool, block: &[u8]) -> Result<(), ReadError> {
        // Every block, also one that is refused: the next needs its state.
        let headers = self.inflater.read(block)?;
        if id.is_multiple_of(2) || id <= self.last_stream.load(Ordering::Relaxed) {
            self.shared.reset(id, Reset::ProtocolError);
            return Ok(());
        }
        self.last_stream.store(id, Ordering::Relaxed);
        if self.streams.len() >= MAX_STREAMS {
            self.streams
                .retain(|_, entry| entry.state.strong_count() > 0);
        }
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            self.shared.reset(id, Reset::RefusedStream);
            return Ok(());
        };
        let state = Arc::new(State::new(id, Arc::clone(&self.shared), place));
        let mut reading = Reading::new(Arc::clone(&state));
        let taken = Box::new(move |bytes| reading.taken(bytes));
        let (sender, inbox) = inbox(&self.budget, Some(taken));
        let entry = Entry {
            inbox: Some(sender),
            state: Arc::downgrade(&state),
        };
        self.streams.insert(id, entry);
        if fin {
            self.end(id);
        }
        let stream = Stream {
            id,
            headers,
            inbox,
            sender: Sender::new(state),
        };
        // Where nobody accepts any more, this drops the stream: a refusal.
        let _refused = self.opened.send(stream).await.is_err();
        Ok(())
    }
}
