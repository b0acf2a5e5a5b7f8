//! What one guest may cost its daemon: the bytes and events that are taken of
//! it, and the memory that its answers take. Whatever a guest does, it spends
//! of this; what is beyond waits, and what no agent does ends its connection.
//!
//! It lasts as long as the guest's machine does, not as long as a connection:
//! one that is broken off and made again brings nothing new.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep};

use super::{Error, Result};

/// Of the agent's gRPC connection: the output of ExecSync is the most that
/// comes by it. What sessions and logs carry has connections of its own.
const LINK_BYTES_PER_SECOND: u64 = 8 << 20;
const LINK_BURST_BYTES: u64 = 4 << 20;
/// Ends of containers and OOM kills.
const EVENTS_PER_SECOND: u64 = 20;
const EVENT_BURST: u64 = 100;
/// Of what a pod no longer has, an event may still be on its way.
const REMEMBERED: usize = 64;

/// For the answers of all guests together that grow with the containers of a
/// pod. One has two hundred KiB at most for twenty containers: more pods than a
/// node has are asked at once.
pub(crate) const ANSWER_BYTES: usize = 64 << 20;
/// For what ExecSync collects of all guests together, each of them 32 MiB at
/// most.
pub(crate) const OUTPUT_BYTES: usize = 256 << 20;
/// What one permit of either is for.
pub(crate) const PERMIT_BYTES: usize = 1 << 10;

/// So much a second, and so much at once after a rest.
#[derive(Debug)]
pub(crate) struct Bucket {
    per_second: u64,
    burst: Duration,
    /// When all that was taken will have been earned.
    paid_at: Instant,
}

impl Bucket {
    pub(crate) fn new(per_second: u64, burst: u64) -> Self {
        let mut bucket = Self {
            per_second: per_second.max(1),
            burst: Duration::ZERO,
            paid_at: Instant::now(),
        };
        bucket.burst = bucket.time_of(burst);
        bucket
    }

    /// Takes `count`, and returns how long nothing more may be taken.
    pub(crate) fn take(&mut self, count: u64, now: Instant) -> Duration {
        self.paid_at = self.paid_at.max(now) + self.time_of(count);
        self.paid_at.duration_since(now).saturating_sub(self.burst)
    }

    fn time_of(&self, count: u64) -> Duration {
        let nanos = u128::from(count) * 1_000_000_000 / u128::from(self.per_second);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// What all guests share.
#[derive(Clone, Debug)]
pub struct Shared {
    pub(crate) answers: Arc<Semaphore>,
    pub(crate) output: Arc<Semaphore>,
}

impl Default for Shared {
    fn default() -> Self {
        let permits = |bytes: usize| Arc::new(Semaphore::new(bytes / PERMIT_BYTES));
        Self {
            answers: permits(ANSWER_BYTES),
            output: permits(OUTPUT_BYTES),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Budget {
    link: Mutex<Bucket>,
    events: Mutex<Bucket>,
    known: Mutex<Known>,
    /// One request of each guest for what grows with its containers.
    large: Semaphore,
    shared: Shared,
}

#[derive(Debug, Default)]
struct Known {
    containers: BTreeSet<String>,
    gone: VecDeque<String>,
}

impl Budget {
    pub(crate) fn new(shared: Shared) -> Self {
        let bucket = |per_second, burst| Mutex::new(Bucket::new(per_second, burst));
        Self {
            link: bucket(LINK_BYTES_PER_SECOND, LINK_BURST_BYTES),
            events: bucket(EVENTS_PER_SECOND, EVENT_BURST),
            known: Mutex::default(),
            large: Semaphore::new(1),
            shared,
        }
    }

    /// How long the connection is not read from after `cost` bytes.
    pub(super) fn spend_link(&self, cost: u64) -> Duration {
        lock(&self.link).take(cost, Instant::now())
    }

    /// Waits until another event may be taken.
    pub(crate) async fn event(&self) {
        let wait = lock(&self.events).take(1, Instant::now());
        if !wait.is_zero() {
            sleep(wait).await;
        }
    }

    /// The guest may speak of the container from now on.
    pub(crate) fn know(&self, container: &str) {
        lock(&self.known).containers.insert(container.to_owned());
    }

    pub(crate) fn forget(&self, container: &str) {
        let mut known = lock(&self.known);
        if known.containers.remove(container) {
            known.gone.truncate(REMEMBERED - 1);
            known.gone.push_front(container.to_owned());
        }
    }

    pub(crate) fn knows(&self, container: &str) -> bool {
        lock(&self.known).containers.contains(container)
    }

    /// Whether it is the pod's, or was until lately.
    pub(crate) fn knew(&self, container: &str) -> bool {
        let known = lock(&self.known);
        known.containers.contains(container) || known.gone.iter().any(|id| id == container)
    }

    pub(super) fn containers(&self) -> usize {
        lock(&self.known).containers.len()
    }

    /// Room for an answer of `bytes`, and the guest's turn to give one.
    pub(super) async fn large_answer(
        &self,
        bytes: usize,
    ) -> Result<(SemaphorePermit<'_>, SemaphorePermit<'_>)> {
        // Neither semaphore is ever closed.
        let turn = self.large.acquire().await;
        let turn = turn.map_err(|_| Error::Stopping)?;
        let permits = permits(bytes.min(ANSWER_BYTES));
        let room = self.shared.answers.acquire_many(permits).await;
        Ok((turn, room.map_err(|_| Error::Stopping)?))
    }

    pub(crate) fn output(&self) -> &Arc<Semaphore> {
        &self.shared.output
    }
}

pub(crate) fn permits(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whoever waits as told never gets more than the burst and the rate,
        /// and never waits for what was earned.
        #[test]
        fn no_more_is_taken_than_was_earned(
            takes in prop::collection::vec((1..50u64, 0..3000u64), 1..60),
        ) {
            let (per_second, burst, largest) = (20, 100, 50);
            let begun = Instant::now();
            let mut bucket = Bucket::new(per_second, burst);
            let (mut now, mut taken) = (begun, 0);
            for (count, pause) in takes {
                now += Duration::from_millis(pause);
                let wait = bucket.take(count, now);
                taken += count;
                now += wait;
                let earned = (now - begun).as_secs_f64() * per_second as f64 + burst as f64;
                prop_assert!(taken as f64 <= earned + largest as f64);
                prop_assert!(wait.is_zero() || taken as f64 + 1.0 >= burst as f64);
            }
        }
    }

    #[test]
    fn a_rest_earns_no_more_than_the_burst() {
        let mut bucket = Bucket::new(20, 100);
        let now = Instant::now() + Duration::from_secs(3600);
        assert_eq!(bucket.take(100, now), Duration::ZERO);
        assert_eq!(bucket.take(20, now), Duration::from_secs(1));
    }

    #[test]
    fn what_is_gone_is_remembered_for_a_while() {
        let budget = Budget::new(Shared::default());
        for number in 0..=REMEMBERED {
            budget.know(&number.to_string());
            budget.forget(&number.to_string());
        }
        assert!(!budget.knows("1") && budget.knew("1"));
        assert!(!budget.knew("0") && !budget.knew("never"));
        assert_eq!(budget.containers(), 0);
    }
}
