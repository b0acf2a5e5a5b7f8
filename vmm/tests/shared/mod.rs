//! What the boot tests and the benchmark of the kvm machine both have around
//! their guests.

pub mod host;
pub mod initramfs;
pub mod watch;
