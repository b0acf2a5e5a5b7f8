//! When a connection last moved a byte, to end one that is idle too long.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

pub struct Activity {
    started: Instant,
    /// Milliseconds after `started`.
    last: AtomicU64,
    limit: Duration,
}

impl Activity {
    pub fn new(limit: Duration) -> Self {
        Self {
            started: Instant::now(),
            last: AtomicU64::new(0),
            limit,
        }
    }

    pub fn touch(&self) {
        let now = self.started.elapsed().as_millis();
        self.last
            .store(u64::try_from(now).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Resolves once nothing moved for the limit.
    pub async fn idle(&self) {
        loop {
            let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
            let until = self.started + last + self.limit;
            if Instant::now() >= until {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn every_touch_puts_the_end_off() {
        let activity = Activity::new(Duration::from_secs(10));
        let begun = Instant::now();
        tokio::join!(activity.idle(), async {
            tokio::time::sleep(Duration::from_secs(7)).await;
            activity.touch();
        });
        assert_eq!(begun.elapsed(), Duration::from_secs(17));
    }
}
