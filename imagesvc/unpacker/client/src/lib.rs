//! What an unpacker of image layers is told, and how it is run.
//!
//! Used by both sides: `drupe-unpacker` for the messages, the daemon for
//! [`Process`]. The daemon starts two unpackers a layer, and stands between
//! them:
//!
//! ```text
//! registry ─▶ daemon ─▶ unpacker ─▶ daemon ─▶ unpacker ─▶ image file
//!             verifies  decompresses hashes   writes
//! ```
//!
//! Neither is believed. Whoever takes over the one that decompresses (the code
//! there is C, and reads what strangers wrote) can send other bytes along, and
//! what it sends is what the daemon hashes: a layer gets no other name than
//! its bytes have. Whoever takes over the one that writes is the author of
//! those very bytes, and has a bad image of a layer of its own. Were both one
//! process, it could give its image the name of somebody else's layer, which
//! other pods then run.
#![forbid(unsafe_code)]

mod limits;
pub mod packet;
mod process;
mod protocol;
mod wait;

pub use limits::{LimitError, Limits};
pub use process::{Death, Failure, Job, Parent, Process, Unpacker, parent};
pub use protocol::{
    Bounds, Compression, Done, Fault, MAX_FDS, MAX_REASON_CHARS, Missing, Order, Task, Word,
    Written, image_uuid, plain,
};
pub use wait::{NO_PROGRESS, Stop, Stopper, Watch, stopper};
