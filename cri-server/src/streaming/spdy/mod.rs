//! SPDY/3.1, server side, as far as clients of Kubernetes use it: streams that
//! the client opens, in one connection that was an HTTP/1.1 request.
//!
//! [`frame`] and [`headers`] are pure functions over bytes; [`connection`]
//! reads frames and owns the streams' inboxes; [`stream`] is what a protocol
//! holds of one stream; [`window`] and [`credit`] are flow control of what is
//! sent and received.

mod connection;
mod credit;
mod dictionary;
pub mod frame;
pub mod headers;
mod stream;
mod window;

pub use connection::Connection;
pub use stream::{Sender, Stream};
