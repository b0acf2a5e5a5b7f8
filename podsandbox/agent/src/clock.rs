//! The guest's real-time clock.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

/// Nanoseconds since the epoch, until the year 2262.
pub fn now_nanos() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
        })
}

pub fn set(nanos: i64) -> Result<(), Errno> {
    const SECOND: i64 = 1_000_000_000;
    let time = TimeSpec::new(nanos.div_euclid(SECOND), nanos.rem_euclid(SECOND));
    clock_settime(ClockId::CLOCK_REALTIME, time)
}
