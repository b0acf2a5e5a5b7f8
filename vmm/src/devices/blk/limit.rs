//! A disk's rate limit: token buckets for bytes and for requests.
//!
//! A request is admitted while both buckets hold something and may leave them
//! in debt, so that one larger than a bucket gets through and is paid for by
//! those after it.

use std::num::NonZeroU64;
use std::time::Duration;

use vmm_client::RateLimit;

/// What a bucket can save up: this long at its rate.
const BURST: Duration = Duration::from_millis(100);

const NANOS: i128 = 1_000_000_000;

/// The state of a [`RateLimit`]. Times are since any fixed moment.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
}

impl Limiter {
    pub(super) fn new(limit: RateLimit, now: Duration) -> Self {
        let bucket = |rate: Option<NonZeroU64>| rate.map(|rate| Bucket::new(rate, now));
        Self {
            bytes: bucket(limit.bytes_per_second),
            requests: bucket(limit.requests_per_second),
        }
    }

    pub(super) fn is_off(&self) -> bool {
        self.bytes.is_none() && self.requests.is_none()
    }

    /// How long the next request has to wait.
    pub(super) fn wait(&mut self, now: Duration) -> Option<Duration> {
        let wait = |bucket: &mut Option<Bucket>| bucket.as_mut()?.wait(now);
        wait(&mut self.bytes).max(wait(&mut self.requests))
    }

    /// Takes an admitted request of `bytes` into account.
    pub(super) fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.charge(bytes);
        }
        if let Some(bucket) = &mut self.requests {
            bucket.charge(1);
        }
    }
}

#[derive(Debug)]
struct Bucket {
    per_second: i128,
    /// Billionths of a token, so that no time is lost to rounding.
    level: i128,
    updated: Duration,
}

impl Bucket {
    fn new(rate: NonZeroU64, now: Duration) -> Self {
        let mut bucket = Self {
            per_second: i128::from(rate.get()),
            level: 0,
            updated: now,
        };
        bucket.level = bucket.capacity();
        bucket
    }

    /// One token at least, or a low rate would admit nothing.
    fn capacity(&self) -> i128 {
        (self.per_second * BURST.as_nanos() as i128).max(NANOS)
    }

    fn wait(&mut self, now: Duration) -> Option<Duration> {
        let elapsed = now.saturating_sub(self.updated).as_nanos() as i128;
        self.updated = self.updated.max(now);
        self.level = (self.level + elapsed * self.per_second).min(self.capacity());
        if self.level > 0 {
            return None;
        }
        // Until one billionth of a token is there.
        let nanos = (1 - self.level).div_euclid(self.per_second) + 1;
        Some(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ))
    }

    fn charge(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * NANOS;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limit(bytes: u64, requests: u64) -> RateLimit {
        RateLimit {
            bytes_per_second: NonZeroU64::new(bytes),
            requests_per_second: NonZeroU64::new(requests),
        }
    }

    #[test]
    fn nothing_stated_is_unlimited() {
        let mut limiter = Limiter::new(RateLimit::default(), Duration::ZERO);
        assert!(limiter.is_off());
        limiter.charge(u64::MAX);
        assert_eq!(limiter.wait(Duration::ZERO), None);
    }

    #[test]
    fn a_request_larger_than_a_bucket_gets_through_and_is_paid_for() {
        let mut limiter = Limiter::new(limit(1000, 0), Duration::ZERO);
        assert_eq!(limiter.wait(Duration::ZERO), None);
        limiter.charge(5000);
        let wait = limiter.wait(Duration::ZERO).unwrap();
        // 100 bytes were saved up.
        assert_eq!(wait.as_millis(), 4900);
        assert!(limiter.wait(wait - Duration::from_millis(1)).is_some());
        assert_eq!(limiter.wait(wait), None);
    }

    proptest! {
        /// Over any time no more is admitted than the rate, what was saved up,
        /// and the one request that went into debt; and whoever waits as long
        /// as told is admitted.
        #[test]
        fn rates_are_kept(
            bytes in 1u64..1 << 40,
            requests in 1u64..100_000,
            sizes in prop::collection::vec(0u64..1 << 22, 1..200),
        ) {
            let mut limiter = Limiter::new(limit(bytes, requests), Duration::ZERO);
            let mut now = Duration::ZERO;
            let (mut moved, mut count) = (0u64, 0u64);
            for size in sizes {
                if let Some(wait) = limiter.wait(now) {
                    now += wait;
                    prop_assert_eq!(limiter.wait(now), None);
                }
                let time = now.as_secs_f64() + BURST.as_secs_f64();
                prop_assert!(moved as f64 <= bytes as f64 * time + f64::from(1 << 22) + 1.0);
                prop_assert!(count as f64 <= requests as f64 * time + 2.0);
                limiter.charge(size);
                moved += size;
                count += 1;
            }
        }
    }
}
