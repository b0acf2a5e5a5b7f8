//! What the boot tests and the benchmark of the kvm machine both have around
//! their guests.

pub mod host;
pub mod initramfs;
#[cfg(target_arch = "x86_64")]
pub mod takeover;
pub mod watch;
