//! The agent in a guest of its own kernel, driven over vsock as the daemon
//! drives it. Needs root, a UML kernel (`DRUPE_TEST_KERNEL`), the initramfs
//! (`DRUPE_TEST_INITRAMFS`), drupe-vmm (`DRUPE_TEST_VMM`), a static busybox and
//! mkfs.erofs.

#![allow(clippy::unwrap_used, reason = "a test that fails says where")]

mod containers;
mod files;
mod harness;
mod network;
mod pod;
mod processes;
mod streams;
mod userns;

/// A shell's, until it is told to end.
const FOREVER: &str = "trap 'exit 0' TERM; while :; do sleep 1; done";
