//! One pod's virtual machine: devices, the machine that runs the guest's
//! kernel, and the jail around both.
//!
//! ```text
//! supervisor ── control socket ── daemon
//!   │ reaps, logs the console, answers, ends everything
//!   ├─ machine: kvm (threads), uml (a child)     kernel ◀─┐
//!   └─ event loops: net vsock rng | disks | shared dir    │ virtqueues
//!        devices ── transport (virtio-mmio, vhost-user) ──┘
//!           │
//!        channel ── file server, a process of its own ── the pod's shared directory
//! ```
//!
//! `main` hands over to [`run`]. The modules are public for tests only.

mod boot;
pub mod bounded;
pub mod confinement;
pub mod console;
pub mod core_scheduling;
pub mod devices;
pub mod event_loop;
pub mod files;
pub mod filter;
pub mod handoff;
pub mod jail;
pub mod logs;
pub mod machine;
mod packet;
#[cfg(test)]
mod refusing;
pub mod supervisor;
pub mod transport;

pub use boot::{BootError, run};

/// Whatever the other threads of whoever started this process had open at the
/// wrong moment.
fn close_surplus_descriptors() {
    // SAFETY: nothing in this process owns a descriptor above 2 yet.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}
