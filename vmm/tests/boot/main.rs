//! Real guests in the jail, seen from their consoles and from the daemon's
//! side.

// Not all of a test's code is in functions that clippy takes for tests.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[cfg(target_arch = "x86_64")]
mod attempts;
mod common;
mod confinement;
mod devices;
mod lacking;
mod lifecycle;
#[path = "../shared/mod.rs"]
mod shared;
#[cfg(target_arch = "x86_64")]
mod table;
#[cfg(target_arch = "x86_64")]
mod taken;
#[cfg(target_arch = "x86_64")]
mod takeover;
