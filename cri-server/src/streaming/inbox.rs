//! What a client sent on one of its streams, until the pod takes it.
//!
//! An inbox holds a few pieces, and all inboxes of a connection together no
//! more than its budget; beyond, the connection's reader waits, and TCP makes
//! the client wait. Clients of Kubernetes know no other flow control: their
//! SPDY ignores windows.

use std::io;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Pieces of one stream that wait.
const PIECES: usize = 8;
/// Bytes that wait on all streams of one connection.
const BUDGET: usize = 2 << 20;

/// The bytes that a connection may hold for its streams.
#[derive(Clone)]
pub struct Budget(Arc<Semaphore>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(BUDGET)))
    }
}

struct Piece {
    data: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

/// The connection's side. Dropping it is the end of the stream, or, without
/// [`InboxSender::end`], its loss.
pub struct InboxSender {
    pieces: mpsc::Sender<Piece>,
    ended: Arc<OnceLock<()>>,
    budget: Budget,
}

/// Called with each number of bytes that was taken out.
type Taken = Box<dyn FnMut(usize) + Send>;

pub struct Inbox {
    pieces: mpsc::Receiver<Piece>,
    ended: Arc<OnceLock<()>>,
    taken: Option<Taken>,
}

pub fn inbox(budget: &Budget, taken: Option<Taken>) -> (InboxSender, Inbox) {
    let (sender, receiver) = mpsc::channel(PIECES);
    let ended = Arc::new(OnceLock::new());
    let inbox = Inbox {
        pieces: receiver,
        ended: Arc::clone(&ended),
        taken,
    };
    let sender = InboxSender {
        pieces: sender,
        ended,
        budget: budget.clone(),
    };
    (sender, inbox)
}

impl InboxSender {
    /// Waits for room. `false` when nobody will read it.
    pub async fn send(&self, data: Bytes) -> bool {
        if data.is_empty() || self.pieces.is_closed() {
            return !self.pieces.is_closed();
        }
        let size = u32::try_from(data.len().min(BUDGET)).unwrap_or(u32::MAX);
        let room = tokio::select! {
            room = Arc::clone(&self.budget.0).acquire_many_owned(size) => room.ok(),
            () = self.pieces.closed() => return false,
        };
        let piece = Piece { data, _room: room };
        self.pieces.send(piece).await.is_ok()
    }

    /// The client will send no more.
    pub fn end(self) {
        // A second end cannot be: this consumes the sender.
        let _first = self.ended.set(());
    }
}

impl Inbox {
    /// `None` at the stream's end.
    pub async fn recv(&mut self) -> io::Result<Option<Bytes>> {
        match self.pieces.recv().await {
            Some(piece) => {
                if let Some(taken) = &mut self.taken {
                    taken(piece.data.len());
                }
                Ok(Some(piece.data))
            }
            None if self.ended.get().is_some() => Ok(None),
            None => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}
