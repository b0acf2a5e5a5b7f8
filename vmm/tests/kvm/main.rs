//! Guests of a few instructions, written here, in the real machine. They run
//! wherever /dev/kvm opens, also where an ordinary kernel would not.

// Not all of a test's code is in functions that clippy takes for tests.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bad_input;
mod common;
mod devices;
mod machine;
mod script;
