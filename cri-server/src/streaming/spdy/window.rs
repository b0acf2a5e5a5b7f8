//! Flow control of what is sent (draft 3.1, 2.6.8).
//!
//! The SPDY that clients of Kubernetes use neither keeps to windows nor ever
//! opens one again, so a window closes only for a client that showed, by
//! SETTINGS or WINDOW_UPDATE, that it opens them. What was sent is counted
//! from the start. For the others TCP holds us up.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

const INITIAL: i64 = 64 << 10;
const MAX: i64 = i32::MAX as i64;

/// One stream's window, less the initial one, which may change later. Only
/// changed while the connection's [`Windows`] are locked.
#[derive(Default)]
pub struct StreamWindow(AtomicI64);

#[derive(Default)]
pub struct Windows {
    state: Mutex<State>,
    opened: Notify,
}

struct State {
    kept: bool,
    initial: i64,
    connection: i64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            kept: false,
            initial: INITIAL,
            connection: INITIAL,
        }
    }
}

/// A window was opened beyond 2^31 - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow;

impl Windows {
    /// How many of `wanted` bytes may be sent now; waits until it is one at
    /// least.
    pub async fn take(&self, stream: &StreamWindow, wanted: usize) -> usize {
        loop {
            let opened = self.opened.notified();
            tokio::pin!(opened);
            // Before the look at the state, so that no change is missed.
            opened.as_mut().enable();
            let taken = self.try_take(stream, wanted);
            if taken > 0 || wanted == 0 {
                return taken;
            }
            opened.await;
        }
    }

    fn try_take(&self, stream: &StreamWindow, wanted: usize) -> usize {
        let mut state = self.lock();
        let wanted = i64::try_from(wanted).unwrap_or(MAX);
        let taken = if state.kept {
            let open = state.initial + stream.0.load(Ordering::Relaxed);
            wanted.min(open).min(state.connection).max(0)
        } else {
            wanted
        };
        stream.0.fetch_sub(taken, Ordering::Relaxed);
        state.connection -= taken;
        usize::try_from(taken).unwrap_or(0)
    }

    pub fn set_initial(&self, initial: u32) {
        let mut state = self.lock();
        state.kept = true;
        state.initial = initial.into();
        self.opened.notify_waiters();
    }

    pub fn open_connection(&self, delta: u32) -> Result<(), Overflow> {
        let mut state = self.lock();
        state.kept = true;
        state.connection += i64::from(delta);
        self.opened.notify_waiters();
        if state.connection > MAX {
            return Err(Overflow);
        }
        Ok(())
    }

    pub fn open_stream(&self, stream: &StreamWindow, delta: u32) -> Result<(), Overflow> {
        let mut state = self.lock();
        state.kept = true;
        let open = stream.0.fetch_add(delta.into(), Ordering::Relaxed) + i64::from(delta);
        self.opened.notify_waiters();
        if state.initial + open > MAX {
            return Err(Overflow);
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_bind_only_clients_that_open_them() {
        let windows = Windows::default();
        let stream = StreamWindow::default();
        assert_eq!(windows.try_take(&stream, 1 << 20), 1 << 20);
        // The first update says that the client counts: it is still far behind.
        windows.open_stream(&stream, 1000).unwrap();
        assert_eq!(windows.try_take(&stream, 10), 0);
        windows.open_stream(&stream, 1 << 20).unwrap();
        assert_eq!(
            windows.try_take(&stream, 10),
            0,
            "the connection's is closed"
        );
        windows.open_connection(1 << 20).unwrap();
        assert_eq!(windows.try_take(&stream, 10), 10);
        assert_eq!(windows.try_take(&stream, 1 << 20), (64 << 10) - 10);
    }

    #[test]
    fn a_smaller_initial_window_counts_for_streams_that_are_open() {
        let windows = Windows::default();
        let stream = StreamWindow::default();
        windows.set_initial(100);
        assert_eq!(windows.try_take(&stream, 1000), 100);
        windows.set_initial(50);
        windows.open_stream(&stream, 20).unwrap();
        assert_eq!(windows.try_take(&stream, 1000), 0);
        windows.open_stream(&stream, 40).unwrap();
        assert_eq!(windows.try_take(&stream, 1000), 10);
        let most = i32::MAX as u32;
        assert_eq!(windows.open_stream(&stream, most), Ok(()));
        assert_eq!(windows.open_stream(&stream, 1), Err(Overflow));
    }

    #[tokio::test]
    async fn who_waits_goes_on_when_the_window_opens() {
        let windows = std::sync::Arc::new(Windows::default());
        windows.set_initial(0);
        let waiting = {
            let windows = windows.clone();
            tokio::spawn(async move { windows.take(&StreamWindow::default(), 7).await })
        };
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        windows.set_initial(5);
        assert_eq!(waiting.await.unwrap(), 5);
    }
}
