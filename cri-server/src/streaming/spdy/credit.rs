//! Flow control of what is received (draft 3.1, 2.6.8).
//!
//! What was read is told to a client that counts. The SPDY that clients of
//! Kubernetes use does not: they send more than they were let, by which they
//! are known, and telling them would be two small writes for every piece.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Told in steps of this, half of the window that a client starts with.
pub const STEP: usize = 32 << 10;

const INITIAL: u64 = 64 << 10;

/// A connection's.
#[derive(Default)]
pub struct Credit {
    /// Read on all streams and not told yet.
    untold: AtomicU64,
    told: AtomicU64,
    received: AtomicU64,
    ignored: AtomicBool,
}

impl Credit {
    /// Counts what came over the connection.
    pub fn received(&self, bytes: usize) {
        let received = self.received.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        // Counted as told before it is sent: who is beyond it does not count.
        if received > INITIAL + self.told.load(Ordering::Relaxed) {
            self.ignored.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the client keeps to windows, as far as it showed.
    pub fn is_kept(&self) -> bool {
        !self.ignored.load(Ordering::Relaxed)
    }

    /// Counts what was read, and how much of it all is to be told now.
    pub fn read(&self, bytes: usize) -> usize {
        let untold = self.untold.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if untold < STEP as u64 {
            return 0;
        }
        let untold = self.untold.swap(0, Ordering::Relaxed);
        self.told.fetch_add(untold, Ordering::Relaxed);
        usize::try_from(untold).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_keeps_to_its_window_is_told_in_steps() {
        let credit = Credit::default();
        credit.received(64 << 10);
        assert_eq!((credit.read(STEP - 1), credit.read(1)), (0, STEP));
        credit.received(STEP);
        assert!(credit.is_kept());
        assert_eq!(credit.read(STEP), STEP);
    }

    #[test]
    fn a_client_beyond_its_window_does_not_keep_to_it() {
        let credit = Credit::default();
        credit.received(64 << 10);
        credit.read(STEP);
        credit.received(STEP + 1);
        assert!(!credit.is_kept());
    }
}
