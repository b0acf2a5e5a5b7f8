//! A container's output for those who are attached to it, from the moment they
//! are.
//!
//! The one who reads the pipe gives every chunk to the log first and then to
//! the clients. A client that is slow holds the container up for a while, as a
//! full pipe would; one that takes nothing for longer is dropped, since it may
//! have stopped its terminal for the night.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{mpsc, watch};

/// Chunks that wait for one client: 256 KiB.
const QUEUE: usize = 4;

/// How long a client may take nothing while its queue is full.
pub const STALL: Duration = Duration::from_secs(10);

type Chunk = Arc<[u8]>;

#[derive(Debug, Default)]
pub struct Tee {
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    list: Vec<Client>,
    over: bool,
}

#[derive(Clone, Debug)]
struct Client {
    queue: mpsc::Sender<Chunk>,
    dropped: Arc<watch::Sender<bool>>,
}

/// What one client gets.
#[derive(Debug)]
pub struct Tap {
    queue: mpsc::Receiver<Chunk>,
    dropped: watch::Receiver<bool>,
}

/// The client took nothing for [`STALL`].
#[derive(Debug, PartialEq, Eq)]
pub struct TooSlow;

impl Tee {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        // Every change is one call.
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All output from now on; at its end at once when there is no more.
    pub fn tap(&self) -> Tap {
        let (sender, queue) = mpsc::channel(QUEUE);
        let (drop, dropped) = watch::channel(false);
        let mut clients = self.clients();
        if !clients.over {
            clients.list.push(Client {
                queue: sender,
                dropped: Arc::new(drop),
            });
        }
        Tap { queue, dropped }
    }

    pub async fn give(&self, bytes: &[u8]) {
        let clients = {
            let mut clients = self.clients();
            clients.list.retain(|client| !client.queue.is_closed());
            if clients.list.is_empty() {
                return;
            }
            clients.list.clone()
        };
        let chunk: Chunk = bytes.into();
        join_all(clients.iter().map(async |client| {
            use mpsc::error::SendTimeoutError::Timeout;
            // One that has gone meanwhile wants no more.
            if let Err(Timeout(_)) = client.queue.send_timeout(chunk.clone(), STALL).await {
                client.dropped.send_replace(true);
            }
        }))
        .await;
        let kept = |client: &Client| !*client.dropped.borrow();
        self.clients().list.retain(kept);
    }

    /// There is no more output.
    pub fn end(&self) {
        let mut clients = self.clients();
        clients.over = true;
        clients.list.clear();
    }
}

impl Tap {
    /// None at the end.
    pub async fn next(&mut self) -> Result<Option<Chunk>, TooSlow> {
        match self.queue.recv().await {
            None if *self.dropped.borrow() => Err(TooSlow),
            chunk => Ok(chunk),
        }
    }

    /// Waits until the client is dropped for being too slow, if ever.
    pub async fn dropped(&mut self) {
        if self.dropped.wait_for(|dropped| *dropped).await.is_err() {
            std::future::pending().await
        }
    }

    /// Nothing after what was given by now.
    pub fn close(&mut self) {
        self.queue.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(mut tap: Tap) -> (Vec<u8>, Option<TooSlow>) {
        let mut all = Vec::new();
        loop {
            match tap.next().await {
                Ok(Some(chunk)) => all.extend_from_slice(&chunk),
                Ok(None) => return (all, None),
                Err(slow) => return (all, Some(slow)),
            }
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn every_client_gets_what_comes_after_it() {
        let tee = Tee::default();
        tee.give(b"nobody ").await;
        let first = tee.tap();
        tee.give(b"one ").await;
        let mut second = tee.tap();
        tee.give(b"two ").await;
        second.close();
        tee.give(b"three").await;
        tee.end();
        assert_eq!(all(first).await, (b"one two three".to_vec(), None));
        assert_eq!(all(second).await, (b"two ".to_vec(), None));
        assert_eq!(all(tee.tap()).await, (Vec::new(), None));
        assert!(tee.clients().list.is_empty());
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn a_client_that_takes_nothing_is_dropped_and_the_rest_go_on() {
        let tee = Arc::new(Tee::default());
        let (stuck, gone) = (tee.tap(), tee.tap());
        let reader = tokio::spawn(all(tee.tap()));
        drop(gone);
        let begun = tokio::time::Instant::now();
        for _ in 0..2 * QUEUE {
            tee.give(b"x").await;
        }
        assert_eq!(begun.elapsed(), STALL, "held up once, and no longer");
        assert_eq!(tee.clients().list.len(), 1);
        tee.end();
        assert_eq!(reader.await.unwrap(), (vec![b'x'; 2 * QUEUE], None));
        assert_eq!(all(stuck).await, (vec![b'x'; QUEUE], Some(TooSlow)));
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn a_slow_client_that_reads_on_loses_nothing() {
        let tee = Arc::new(Tee::default());
        let mut tap = tee.tap();
        let reader = tokio::spawn(async move {
            let mut count = 0;
            while let Some(chunk) = tap.next().await.unwrap() {
                count += chunk.len();
                tokio::time::sleep(STALL / 2).await;
            }
            count
        });
        for _ in 0..4 * QUEUE {
            tee.give(b"x").await;
        }
        tee.end();
        assert_eq!(reader.await.unwrap(), 4 * QUEUE);
    }
}
