//! What every pod driver shares.

use std::sync::Arc;

use crate::agent::budget::Shared;
use crate::config::Config;
use crate::events::Events;
use crate::faults::Ledger;
use crate::network::Network;
use crate::observer::Observer;
use crate::store::Store;
use imagesvc::ImageService;

pub struct Context {
    pub config: Config,
    pub store: Store,
    pub images: ImageService,
    pub network: Network,
    pub events: Events,
    pub observer: Arc<dyn Observer>,
    /// What all guests together may take of the daemon's memory.
    pub shared: Shared,
    pub faults: Ledger,
}

/// Nanoseconds since the epoch, the unit of CRI's times.
#[must_use]
pub fn now_nanos() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// A time that somebody else has told, who may say anything, in the bounds of
/// what is known here: not after `now`, and not before `from`, which wins where
/// the clock was set back and `now` is before it.
#[must_use]
pub fn told_nanos(told: i64, from: i64, now: i64) -> i64 {
    told.min(now).max(from)
}

/// The time of something new that is to come after others: their order is told
/// by these times, also when the clock was set back.
#[must_use]
pub fn later_nanos(now: i64, others: impl Iterator<Item = i64>) -> i64 {
    let last = others.max().map_or(i64::MIN, |last| last.saturating_add(1));
    now.max(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_back_breaks_no_order() {
        assert_eq!(told_nanos(5, 3, 9), 5);
        assert_eq!(told_nanos(i64::MAX, 3, 9), 9);
        assert_eq!(told_nanos(i64::MIN, 3, 9), 3);
        // Made at 100; it is 9 now.
        assert_eq!(told_nanos(5, 100, 9), 100);
        assert_eq!(later_nanos(9, [100, 7].into_iter()), 101);
        assert_eq!(later_nanos(9, [3].into_iter()), 9);
        assert_eq!(later_nanos(9, std::iter::empty()), 9);
    }
}
