//! Pods as microVMs, and those that share the host's kernel ([`host`]).
//!
//! [`PodManager`] is the door: it names pods and containers, finds them, and
//! hands requests to the pod's [`driver`] task, the only owner of its mutable
//! state. Records ([`record`], [`store`]) are on disk before a step is taken.
//! Used by the CRI server; uses `vmm-client`, the agent, `imagesvc`, `netns`.
#![forbid(unsafe_code)]

mod agent;
pub mod cdi;
mod cgroup;
pub mod config;
pub mod confinement;
mod context;
pub mod devices;
mod driver;
mod error;
pub mod events;
pub mod faults;
mod figures;
pub mod host;
#[cfg(test)]
mod hostile;
mod id_mapping;
mod ids;
mod log_file;
pub mod machine;
mod manager;
mod network;
mod observer;
mod oci;
mod overhead;
mod paths;
mod phase;
mod process;
pub mod record;
pub mod resize;
mod scratch;
mod seccomp;
mod session;
mod shell;
pub mod signals;
mod sizing;
mod snapshot;
pub mod spec;
mod store;
mod sysctls;
mod trash;
mod volumes;

pub use agent::AgentClient;
pub use agent_api::{ContainerStats, DiskStats, GuestStats, Pressure, PressureData};
pub use context::now_nanos;
pub use error::{Error, ErrorKind, Result, Step, sentence};
pub use figures::{Figures, PodFigures};
pub use manager::{ExecOutput, PodManager};
pub use network::{Exempt, Network, NetworkOptions};
pub use observer::{MachineEnd, NotStarted, Observer, StartFailure, StartOver, TraceParent};
pub use overhead::Overhead;
pub use session::{AttachOptions, ExecOptions, Session};
pub use shell::{Shell, ShellError, ShellOptions};
pub use snapshot::PodSnapshot;
pub use vmm_client::Machine;
