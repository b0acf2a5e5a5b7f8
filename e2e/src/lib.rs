//! The real parts, started for a test: an image registry, CNI plugins, crictl
//! and the daemon, each test's in a network namespace and a cgroup of its own,
//! and a proof at its end that nothing is left on the machine.
//!
//! A test starts a [`Node`], speaks CRI to it through [`Cri`] or
//! [`Node::crictl`], and ends with [`Node::finish`]. Everything here is
//! blocking: a test reads like a user's script and uses threads where a user
//! would use a second terminal.
#![forbid(unsafe_code)]

pub mod artifacts;
pub mod bench;
pub mod certificates;
pub mod cgroup;
pub mod cluster;
pub mod collector;
pub mod cri;
pub mod critest;
pub mod debian;
pub mod eventually;
pub mod guard;
pub mod http;
pub mod image;
pub mod layer;
pub mod leaks;
pub mod log;
pub mod machine;
pub mod netns;
pub mod node;
pub mod output;
pub mod pod;
pub mod proxy;
pub mod reaper;
pub mod registry;
pub mod streams;

pub use cri::Cri;
pub use eventually::eventually;
pub use machine::{Machine, patient};
pub use node::{Node, NodeBuilder, Server};
pub use pod::{Container, Pod};
