//! Requests of one disk that wait for the host, on threads of [`Workers`].
//!
//! Requests are independent of each other, but for one thing: a flush starts
//! when all changes taken from the queue before it are done, so that it covers
//! them even for a driver that did not wait for them.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::backing::Backing;
use super::request::{Op, Outcome, OwnedRequest};
use super::workers::Workers;
use super::{QUEUE_SIZE, State};

pub(super) struct Flight {
    shared: Arc<Shared>,
    workers: Workers,
    /// Requests launched and not landed, held flushes included.
    count: usize,
    /// Changes among them.
    changes: usize,
    /// Flushes that were held so far; a change belongs to the next one.
    epoch: u64,
    held: VecDeque<HeldFlush>,
}

struct HeldFlush {
    task: Task,
    epoch: u64,
    /// Earlier changes that are still under way.
    waits_for: usize,
}

struct Task {
    head: u16,
    request: OwnedRequest,
    backing: Arc<Backing>,
    state: State,
    /// The epoch of a change.
    change: Option<u64>,
}

struct Shared {
    landed: Mutex<Vec<Landed>>,
    /// One more has landed.
    more: Condvar,
    event: EventFd,
    /// The driver has gone: what has not begun need not.
    cancelled: AtomicBool,
}

struct Landed {
    head: u16,
    outcome: Outcome,
    change: Option<u64>,
}

impl Flight {
    pub(super) fn new(workers: Workers) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            shared: Arc::new(Shared {
                landed: Mutex::default(),
                more: Condvar::new(),
                event: EventFd::from_flags(flags)?,
                cancelled: AtomicBool::new(false),
            }),
            workers,
            count: 0,
            changes: 0,
            epoch: 0,
            held: VecDeque::new(),
        })
    }

    pub(super) fn use_workers(&mut self, workers: Workers) {
        self.workers = workers;
    }

    /// Ready when requests have landed, or after [`Flight::ring`].
    pub(super) fn event(&self) -> &EventFd {
        &self.shared.event
    }

    pub(super) fn ring(&self) -> io::Result<()> {
        self.shared.event.write(1)?;
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether there are as many as a driver can have in its queue. One that
    /// gives the same descriptors again has to wait.
    pub(super) fn is_full(&self) -> bool {
        self.count >= usize::from(QUEUE_SIZE)
    }

    pub(super) fn launch(
        &mut self,
        head: u16,
        request: OwnedRequest,
        backing: Arc<Backing>,
        state: &State,
    ) {
        let is_flush = matches!(request.op(), Op::Flush);
        let change = request.op().changes_disk().then_some(self.epoch);
        let task = Task {
            head,
            request,
            backing,
            state: state.clone(),
            change,
        };
        self.count += 1;
        self.changes += usize::from(change.is_some());
        if is_flush && self.changes > 0 {
            self.held.push_back(HeldFlush {
                task,
                epoch: self.epoch,
                waits_for: self.changes,
            });
            self.epoch += 1;
        } else {
            self.start(task);
        }
    }

    fn start(&self, task: Task) {
        let shared = self.shared.clone();
        self.workers.run(Box::new(move || shared.run(&task)));
    }

    /// The requests that are done, and starts the flushes that waited for
    /// them.
    pub(super) fn land(&mut self) -> Vec<(u16, Outcome)> {
        // Spurious at worst: the list is what counts.
        let _ = self.shared.event.read();
        let landed = std::mem::take(&mut *self.shared.lock());
        self.count -= landed.len();
        for change in landed.iter().filter_map(|l| l.change) {
            self.changes -= 1;
            for flush in &mut self.held {
                flush.waits_for -= usize::from(change <= flush.epoch);
            }
        }
        while let Some(flush) = self.held.pop_front_if(|flush| flush.waits_for == 0) {
            self.start(flush.task);
        }
        landed.into_iter().map(|l| (l.head, l.outcome)).collect()
    }

    /// Waits for what is under way and forgets it: afterwards nothing writes
    /// to the guest any more.
    pub(super) fn abandon(&mut self) {
        self.count -= self.held.len();
        self.held.clear();
        self.shared.cancelled.store(true, Ordering::Relaxed);
        let mut landed = self.shared.lock();
        while landed.len() < self.count {
            landed = self
                .shared
                .more
                .wait(landed)
                .unwrap_or_else(PoisonError::into_inner);
        }
        landed.clear();
        drop(landed);
        self.shared.cancelled.store(false, Ordering::Relaxed);
        (self.count, self.changes) = (0, 0);
    }
}

impl Drop for Flight {
    /// The guest's memory may go with the device.
    fn drop(&mut self) {
        self.abandon();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Landed>> {
        self.landed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, task: &Task) {
        let outcome = match self.cancelled.load(Ordering::Relaxed) {
            true => Outcome::default(),
            false => task.request.execute(&task.backing, &task.state),
        };
        self.lock().push(Landed {
            head: task.head,
            outcome,
            change: task.change,
        });
        self.more.notify_all();
        if let Err(error) = self.event.write(1) {
            // It would take 2^64 of them unread.
            tracing::error!(%error, "a disk's loop cannot be woken");
        }
    }
}
