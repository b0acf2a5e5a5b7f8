//! A measurement that is asked for often and takes long.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};

use crate::Usage;

/// As often as cAdvisor measures: the kubelet asks about as often.
const INTERVAL: Duration = Duration::from_secs(10);
/// A walk that takes long is done for this part of the time at most.
const PART_OF_TIME: u32 = 10;

/// The last answer. One walk is under way at a time.
#[derive(Clone, Debug, Default)]
pub struct Cached(Arc<Mutex<Measured>>);

#[derive(Debug, Default)]
struct Measured {
    usage: Usage,
    running: bool,
    /// None: at once.
    next: Option<Instant>,
}

impl Cached {
    /// What `walk` says, or what it said last: while it is not due again, or if
    /// it takes longer than `patience`.
    pub async fn get(
        &self,
        patience: Duration,
        walk: impl FnOnce() -> io::Result<Usage> + Send + 'static,
    ) -> Usage {
        {
            let mut measured = self.lock();
            let early = measured.next.is_some_and(|next| Instant::now() < next);
            if measured.running || early {
                return measured.usage;
            }
            measured.running = true;
        }
        let cached = self.clone();
        let work = spawn_blocking(move || {
            let begun = Instant::now();
            let usage = walk();
            let mut measured = cached.lock();
            measured.running = false;
            measured.next = Some(Instant::now() + INTERVAL.max(begun.elapsed() * PART_OF_TIME));
            match usage {
                Ok(usage) => measured.usage = usage,
                Err(error) => tracing::warn!(%error, "cannot measure what was written"),
            }
        });
        // One that takes longer tells the next who asks.
        drop(timeout(patience, work).await);
        self.lock().usage
    }

    fn lock(&self) -> MutexGuard<'_, Measured> {
        // Every change is one of independent assignments.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn of(bytes: u64) -> io::Result<Usage> {
        Ok(Usage { bytes, inodes: 1 })
    }

    // The clock stands still while a walk is under way.
    #[tokio::test(start_paused = true)]
    async fn a_walk_is_done_once_in_a_while() {
        let cached = Cached::default();
        assert_eq!(cached.get(PATIENCE, || of(1)).await.bytes, 1);
        assert_eq!(cached.get(PATIENCE, || of(2)).await.bytes, 1);
        tokio::time::advance(INTERVAL).await;
        assert_eq!(cached.get(PATIENCE, || of(3)).await.bytes, 3);
        tokio::time::advance(INTERVAL).await;
        let failed = || Err(io::ErrorKind::PermissionDenied.into());
        assert_eq!(cached.get(PATIENCE, failed).await.bytes, 3);
    }

    #[tokio::test]
    async fn one_that_takes_long_is_not_waited_for_nor_done_twice() {
        let cached = Cached::default();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let slow = move || {
            assert!(wait.recv().is_err());
            of(7)
        };
        let soon = Duration::from_millis(1);
        assert_eq!(cached.get(soon, slow).await.bytes, 0);
        assert_eq!(cached.get(soon, || of(9)).await.bytes, 0);
        drop(go);
        while cached.get(soon, || of(9)).await.bytes != 7 {
            tokio::task::yield_now().await;
        }
    }
}
