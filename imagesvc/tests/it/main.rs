//! The image service against a real registry, and against a server that
//! misbehaves as told.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod auth;
mod faults;
mod pull;
mod resume;
mod store;
mod support;
mod unpacker;
