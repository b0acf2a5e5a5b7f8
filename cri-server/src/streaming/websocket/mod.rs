//! WebSocket (RFC 6455), server side, after the handshake: frames
//! ([`frame`]), a connection that takes messages apart as they come
//! ([`connection`]), and what Kubernetes runs over it: numbered channels
//! ([`channels`]) and a tunnel for SPDY ([`tunnel`]).
//!
//! Framing is our own because messages must be handed on piece by piece: a
//! client may send its whole standard input as one message, and the libraries
//! collect a message, or a frame, before they give it out.

pub mod channels;
mod connection;
pub mod frame;
mod tunnel;

pub use channels::{Channel, Channels};
pub use tunnel::tunnel;
