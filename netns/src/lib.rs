//! Pod networks: the network namespace of a pod, what CNI plugins put into it,
//! and the tap through which the pod's virtual machine reaches it.
//!
//! The pod driver calls this crate in the order
//!
//! ```text
//! Netns::create ─► create_tap ─► Cni::add ─► redirect  (tap ◄─tc mirred─► eth0)
//!                                                └─► (agent configures the guest's NIC)
//!
//! Cni::del ─► Netns::remove      in every undo; both may be repeated
//! ```
//!
//! For a pod on the node's kernel it stops at [`read_interface`].
//!
//! CNI's interface keeps its addresses, so that CHECK and the plugins' DEL find
//! what they made, but the namespace's own stack never sees a packet: both
//! directions are redirected before it. The guest takes the interface's MAC,
//! addresses, routes and MTU, and is held to them: see [`SourceCheck`].
//!
//! Nothing here is kept in memory across calls: namespaces are mounts, CNI
//! attachments are files (see [`cni`]), and the tap lives as long as its
//! descriptor. A restarted daemon opens them again by name.

pub mod cni;
mod error;
mod interface;
mod namespace;
mod netlink;
mod redirect;
mod source_check;
mod tap;
mod tc;

#[cfg(test)]
mod testing;

pub use error::NetnsError;
pub use interface::{InterfaceConfig, Neighbor, RouteConfig, read_interface};
pub use namespace::{DEFAULT_DIR, Netns};
pub use redirect::{redirect, try_source_check};
pub use source_check::SourceCheck;
pub use tap::create_tap;
