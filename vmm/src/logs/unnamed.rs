//! Streams that have not said yet whose they are.
//!
//! Any process of the guest may open some: they shall not keep a container's
//! own from being opened, and not stay.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// At once; the oldest one has to go then. A container opens two.
pub(super) const MAX_UNNAMED: usize = 64;

/// How long they may take: the agent says it with the connection.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// By age; their keys among all streams.
pub(super) struct Unnamed {
    waiting: BTreeMap<Age, Waiting>,
    next: Age,
    patience: Duration,
}

/// Its number, by which it is taken out again; higher is younger.
pub(super) type Age = u64;

struct Waiting {
    key: usize,
    deadline: Instant,
}

impl Unnamed {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            waiting: BTreeMap::new(),
            next: 0,
            patience,
        }
    }

    pub(super) fn add(&mut self, key: usize) -> Age {
        let age = self.next;
        self.next += 1;
        let deadline = Instant::now() + self.patience;
        self.waiting.insert(age, Waiting { key, deadline });
        age
    }

    /// The oldest one, if there are too many.
    pub(super) fn surplus(&self) -> Option<usize> {
        let (_, first) = self.waiting.first_key_value()?;
        (self.waiting.len() > MAX_UNNAMED).then_some(first.key)
    }

    pub(super) fn remove(&mut self, age: Age) {
        self.waiting.remove(&age);
    }

    /// When the next one's time is up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        // They are as old as their deadlines.
        let (_, first) = self.waiting.first_key_value()?;
        Some(first.deadline)
    }

    /// Takes out one whose time is up.
    pub(super) fn pop_overdue(&mut self, now: Instant) -> Option<usize> {
        let first = self.waiting.first_entry()?;
        (first.get().deadline <= now).then(|| first.remove().key)
    }
}
