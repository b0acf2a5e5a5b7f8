//! What a pod's VMM is told and how it is spoken to.
//!
//! Used by both sides: `drupe-vmm` for the types, the daemon for [`spawn`],
//! [`Control`] and [`dial_vsock`].
#![forbid(unsafe_code)]

pub mod protocol;
mod spec;

pub use spec::{FdRole, Machine, UmlMode, VmSpec};
