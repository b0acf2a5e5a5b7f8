//! Waiting for what the system under test does by itself.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::patient;

/// How often to look. Most of what is waited for is an answer of the server or
/// of a pod, which sends no event.
const INTERVAL: Duration = Duration::from_millis(10);

/// Calls `check` until it returns Ok; fails with its last Err once `within`,
/// on a slow machine a multiple of it, is over.
pub fn eventually<T, E: Display>(
    what: &str,
    within: Duration,
    mut check: impl FnMut() -> Result<T, E>,
) -> Result<T> {
    let within = patient(within);
    let begun = Instant::now();
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(seen) if begun.elapsed() >= within => {
                bail!(
                    "waited {:.1} s for {what}; last: {seen:#}",
                    within.as_secs_f64()
                )
            }
            Err(_) => thread::sleep(INTERVAL),
        }
    }
}
