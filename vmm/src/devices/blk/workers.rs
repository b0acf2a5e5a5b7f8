//! Threads that wait for the host's disk in the event loop's place.
//!
//! One set serves all disks of a pod. Threads are started when there is work
//! for them and sleep when there is none; there are never more than
//! [`MAX_THREADS`]. What can wait for one is bounded by the disks, which hand
//! over no more than a queue's worth each.
//!
//! Threads rather than io_uring: buffered I/O that misses the page cache is
//! worked off by threads of the kernel there as well, hits are served without
//! either (see [`super::request`]), and many nodes forbid io_uring by sysctl
//! or seccomp.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

/// Requests of one pod that wait for the host at once. Enough to keep a disk
/// busy; each costs a sleeping thread.
const MAX_THREADS: usize = 4;
/// Requests are worked off with a few frames; the default would be 2 MiB.
const STACK_BYTES: usize = 128 * 1024;

pub(super) type Job = Box<dyn FnOnce() + Send>;

/// The threads end with the last handle.
#[derive(Clone)]
pub struct Workers(Arc<Handle>);

struct Handle(Arc<Inner>);

#[derive(Default)]
struct Inner {
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Default for Workers {
    fn default() -> Self {
        Self(Arc::new(Handle(Arc::default())))
    }
}

impl Workers {
    /// Runs `job` on a thread, later. Without one it is run here and now.
    pub(super) fn run(&self, job: Job) {
        let inner = &self.0.0;
        let mut queue = inner.lock();
        if queue.jobs.len() >= queue.idle && queue.threads < MAX_THREADS {
            match Inner::spawn(inner) {
                Ok(()) => queue.threads += 1,
                Err(error) if queue.threads == 0 => {
                    drop(queue);
                    tracing::warn!(%error, "no thread for disk I/O; other disks wait");
                    return job();
                }
                // Those there are will come to it.
                Err(_) => {}
            }
        }
        queue.jobs.push_back(job);
        drop(queue);
        inner.wake.notify_one();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.wake.notify_all();
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(inner: &Arc<Self>) -> io::Result<()> {
        let inner = inner.clone();
        thread::Builder::new()
            .name("disk-io".into())
            .stack_size(STACK_BYTES)
            .spawn(move || inner.work())?;
        Ok(())
    }

    fn work(&self) {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job();
                queue = self.lock();
            } else if queue.closed {
                return;
            } else {
                queue.idle += 1;
                queue = self
                    .wake
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{channel, sync_channel};
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn jobs_run_side_by_side_on_few_threads_which_end_with_the_handle() {
        let workers = Workers::default();
        let weak = Arc::downgrade(&workers.0.0);
        let (started, starts) = channel();
        let mut gates = Vec::new();
        for number in 0..3 * MAX_THREADS {
            let (gate, wait) = sync_channel::<()>(0);
            gates.push(gate);
            let started = started.clone();
            workers.run(Box::new(move || {
                started.send(number).unwrap();
                wait.recv_timeout(PATIENCE).unwrap();
            }));
        }
        let mut first: Vec<_> = (0..MAX_THREADS)
            .map(|_| starts.recv_timeout(PATIENCE).unwrap())
            .collect();
        first.sort_unstable();
        assert_eq!(first, [0, 1, 2, 3], "in order, one a thread");
        assert_eq!(workers.0.0.lock().threads, MAX_THREADS);
        assert!(starts.try_recv().is_err(), "more at once than threads");
        let closing = workers.clone();
        drop(workers);
        for (number, gate) in gates.into_iter().enumerate() {
            gate.send(()).unwrap();
            if number + MAX_THREADS < 3 * MAX_THREADS {
                starts.recv_timeout(PATIENCE).unwrap();
            }
        }
        drop(closing);
        let deadline = std::time::Instant::now() + PATIENCE;
        while weak.upgrade().is_some() {
            assert!(std::time::Instant::now() < deadline, "threads stay");
            thread::yield_now();
        }
    }

    #[test]
    fn a_thread_that_sleeps_is_used_before_another_is_made() {
        let workers = Workers::default();
        let (sender, receiver) = channel();
        for _ in 0..20 {
            let busy = || {
                let queue = workers.0.0.lock();
                queue.threads > queue.idle
            };
            while busy() {
                thread::yield_now();
            }
            let sender = sender.clone();
            workers.run(Box::new(move || sender.send(()).unwrap()));
            receiver.recv_timeout(PATIENCE).unwrap();
        }
        assert_eq!(workers.0.0.lock().threads, 1);
    }
}
