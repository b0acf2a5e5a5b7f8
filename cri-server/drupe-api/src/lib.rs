//! The gRPC interface between `drupe debug` and the daemon, as generated from
//! `proto/debug.proto`, and the bounds that both sides keep to.
#![forbid(unsafe_code)]

pub mod v1 {
    tonic::include_proto!("drupe.v1");
}

/// Largest message either side takes: a command line, or what is typed or said
/// at once.
pub const MAX_MESSAGE_BYTES: usize = 512 << 10;

/// What is read at once of a stream. Less waits with more messages under way.
pub const CHUNK_BYTES: usize = 32 << 10;

/// Messages that wait for the other side before their reader does.
pub const QUEUE: usize = 4;
