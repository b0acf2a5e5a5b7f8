//! What a pod's VMM is told and how it is spoken to.
//!
//! Used by both sides: `drupe-vmm` for the types, the daemon for [`spawn`],
//! [`Control`] and [`dial_vsock`].
#![forbid(unsafe_code)]

mod confinement;
mod control;
mod dial;
mod log_token;
pub mod packet;
pub mod protocol;
mod spawn;
mod spec;
mod text;

pub use confinement::{Confinement, LANDLOCK_ASKED, has_hyperthreads};
pub use control::{Control, ControlError, Events};
pub use dial::{DialError, dial_vsock};
pub use log_token::{LogToken, NoToken};
pub use spawn::{SpawnError, SpawnRequest, VmmProcess, spawn};
pub use spec::{FdRole, HugePages, IdRange, Machine, RateLimit, UmlMode, VmSpec};
pub use text::{plain, plain_within};
