//! Work that several callers want at once is done once.
//!
//! [`Flights::join`] starts the work for a key, or waits for the one under
//! way. A caller that goes away leaves the others their work; when the last
//! one has gone the work is told to stop, and a newcomer waits for its end
//! before starting anew, so that there are never two for one key.

use std::{
    collections::HashMap,
    future::Future,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

type Done<T> = watch::Receiver<Option<T>>;

struct Slot<T> {
    /// Tells a flight from a later one for the same key.
    id: u64,
    waiters: usize,
    cancel: CancellationToken,
    done: Done<T>,
}

struct Slots<K, T> {
    by_key: HashMap<K, Slot<T>>,
    next_id: u64,
}

type Shared<K, T> = Arc<Mutex<Slots<K, T>>>;

pub(crate) struct Flights<K, T> {
    slots: Shared<K, T>,
}

/// What came of the work, and for whom it was begun.
pub(crate) struct Landed<T> {
    pub(crate) value: T,
    /// This caller began it: the failure is its own.
    pub(crate) own: bool,
}

enum Entry<K: Eq + Hash, T> {
    Aboard(Ticket<K, T>, Done<T>, bool),
    /// The work was told to stop and has not ended yet.
    Ending(Done<T>),
}

impl<K, T> Flights<K, T>
where
    K: Clone + Eq + Hash + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    pub(crate) fn new() -> Self {
        Self {
            slots: Arc::new(Mutex::new(Slots {
                by_key: HashMap::new(),
                next_id: 0,
            })),
        }
    }

    /// The work gets a token that tells it to stop. `None` if it ended without
    /// a value, which takes a panic.
    pub(crate) async fn join<F, Work>(&self, key: K, work: F) -> Option<Landed<T>>
    where
        F: FnOnce(CancellationToken) -> Work,
        Work: Future<Output = T> + Send + 'static,
    {
        let mut work = Some(work);
        loop {
            match self.enter(&key, &mut work) {
                Entry::Aboard(ticket, done, own) => {
                    let value = ended(done).await;
                    drop(ticket);
                    return Some(Landed { value: value?, own });
                }
                // However it ended, the slot is free now.
                Entry::Ending(done) => drop(ended(done).await),
            }
        }
    }

    /// Returns once no work for the key is under way that was told to stop.
    pub(crate) async fn settled(&self, key: &K) {
        let ending = {
            let slots = lock(&self.slots);
            let slot = slots.by_key.get(key);
            slot.filter(|slot| slot.cancel.is_cancelled())
                .map(|slot| slot.done.clone())
        };
        if let Some(done) = ending {
            // Either outcome is an end.
            drop(ended(done).await);
        }
    }

    fn enter<F, Work>(&self, key: &K, work: &mut Option<F>) -> Entry<K, T>
    where
        F: FnOnce(CancellationToken) -> Work,
        Work: Future<Output = T> + Send + 'static,
    {
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.by_key.get_mut(key) {
            if slot.cancel.is_cancelled() {
                return Entry::Ending(slot.done.clone());
            }
            slot.waiters += 1;
            return Entry::Aboard(self.ticket(key, slot.id), slot.done.clone(), false);
        }
        let (sender, done) = watch::channel(None);
        let Some(work) = work.take() else {
            return Entry::Ending(done);
        };
        let id = slots.next_id;
        slots.next_id += 1;
        let cancel = CancellationToken::new();
        slots.by_key.insert(
            key.clone(),
            Slot {
                id,
                waiters: 1,
                cancel: cancel.clone(),
                done: done.clone(),
            },
        );
        drop(slots);
        let work = work(cancel);
        let landing = Landing {
            slots: Arc::clone(&self.slots),
            key: key.clone(),
        };
        tokio::spawn(async move {
            let value = work.await;
            // The slot is free before anybody hears of the end.
            drop(landing);
            sender.send_replace(Some(value));
        });
        Entry::Aboard(self.ticket(key, id), done, true)
    }

    fn ticket(&self, key: &K, id: u64) -> Ticket<K, T> {
        Ticket {
            slots: Arc::clone(&self.slots),
            key: key.clone(),
            id,
        }
    }
}

async fn ended<T: Clone>(mut done: Done<T>) -> Option<T> {
    let value = done.wait_for(Option::is_some).await.ok()?;
    value.clone()
}

/// A caller's interest in the work.
struct Ticket<K: Eq + Hash, T> {
    slots: Shared<K, T>,
    key: K,
    id: u64,
}

impl<K: Eq + Hash, T> Drop for Ticket<K, T> {
    fn drop(&mut self) {
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.by_key.get_mut(&self.key)
            && slot.id == self.id
        {
            slot.waiters -= 1;
            if slot.waiters == 0 {
                slot.cancel.cancel();
            }
        }
    }
}

/// Frees the slot, also when the work panics. Nobody takes it before that, so
/// it needs no id.
struct Landing<K: Eq + Hash, T> {
    slots: Shared<K, T>,
    key: K,
}

impl<K: Eq + Hash, T> Drop for Landing<K, T> {
    fn drop(&mut self) {
        lock(&self.slots).by_key.remove(&self.key);
    }
}

/// Nothing is left half-changed while the lock is held, so a panic elsewhere
/// does no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        pin::Pin,
        sync::atomic::{AtomicU32, Ordering},
        task::Poll,
    };

    use tokio::sync::Notify;

    use super::*;

    async fn is_pending<F: Future>(work: &mut Pin<&mut F>) -> bool {
        poll_fn(|context| Poll::Ready(work.as_mut().poll(context).is_pending())).await
    }

    #[tokio::test]
    async fn callers_at_the_same_time_share_one_run() {
        let flights = Flights::<&str, u32>::new();
        let runs = Arc::new(AtomicU32::new(0));
        let go = Arc::new(Notify::new());
        let work = || {
            let (runs, go) = (Arc::clone(&runs), Arc::clone(&go));
            move |_| async move {
                go.notified().await;
                runs.fetch_add(1, Ordering::SeqCst)
            }
        };
        let (first, second, ()) = tokio::join!(
            flights.join("a", work()),
            flights.join("a", work()),
            async { go.notify_one() },
        );
        let (first, second) = (first.unwrap(), second.unwrap());
        assert_eq!((first.value, second.value), (0, 0));
        assert_eq!((first.own, second.own), (true, false));
        go.notify_one();
        assert_eq!(flights.join("a", work()).await.unwrap().value, 1);
    }

    #[tokio::test]
    async fn one_caller_leaving_does_not_stop_the_other() {
        let flights = Arc::new(Flights::<&str, bool>::new());
        let go = Arc::new(Notify::new());
        let started = Arc::new(Notify::new());
        let work = |cancel: CancellationToken| {
            let (go, started) = (Arc::clone(&go), Arc::clone(&started));
            async move {
                started.notify_one();
                go.notified().await;
                cancel.is_cancelled()
            }
        };
        let mut first = Box::pin(flights.join("a", work));
        let mut second = Box::pin(flights.join("a", |_| async { panic!("started twice") }));
        assert!(is_pending(&mut first.as_mut()).await);
        assert!(is_pending(&mut second.as_mut()).await);
        started.notified().await;
        drop(first);
        go.notify_one();
        let landed = second.await.unwrap();
        assert!(!landed.value, "not told to stop");
    }

    #[tokio::test]
    async fn the_last_caller_leaving_stops_it_and_a_new_one_starts_after_its_end() {
        let flights = Flights::<&str, &str>::new();
        let end = Arc::new(Notify::new());
        let ended = Arc::new(AtomicU32::new(0));
        {
            let (end, ended) = (Arc::clone(&end), Arc::clone(&ended));
            let only = flights.join("a", |cancel| async move {
                cancel.cancelled().await;
                end.notified().await;
                ended.store(1, Ordering::SeqCst);
                "stopped"
            });
            tokio::pin!(only);
            assert!(is_pending(&mut only).await);
        }
        let next = flights.join("a", |_| {
            let ended = Arc::clone(&ended);
            async move {
                assert_eq!(ended.load(Ordering::SeqCst), 1);
                "fresh"
            }
        });
        let (landed, ()) = tokio::join!(next, async { end.notify_one() });
        assert_eq!(landed.unwrap().value, "fresh");
    }

    #[tokio::test]
    async fn a_panic_frees_the_key() {
        let flights = Flights::<&str, u32>::new();
        assert!(
            flights
                .join("a", |_| async { panic!("as planned") })
                .await
                .is_none()
        );
        let landed = flights.join("a", |_| async { 7 }).await;
        assert_eq!(landed.unwrap().value, 7);
    }
}
