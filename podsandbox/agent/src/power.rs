//! The end of the guest.

use std::fs;
use std::io::Write;

use nix::mount::{MntFlags, umount2};
use nix::sys::reboot::{RebootMode, reboot};

use crate::rootfs::SCRATCH;

/// Writes back the scratch disk and lets go of it. Containers are dead, so
/// nothing uses it any more; one that could not be killed only costs what it
/// had not written.
pub fn unmount_disks() {
    nix::unistd::sync();
    if let Err(errno) = umount2(SCRATCH, MntFlags::MNT_DETACH) {
        eprintln!("drupe-agent: cannot unmount {SCRATCH}: {errno}");
    }
}

/// Switches the machine off. Only PID 1 of a guest gets here.
///
/// By asking for a restart: a machine without ACPI has no power switch, and
/// neither machine starts over (`noreboot` on uml; on kvm the reset ends it).
pub fn off() -> ! {
    match reboot(RebootMode::RB_AUTOBOOT) {
        Ok(never) => match never {},
        Err(errno) => {
            say(&format!("cannot restart: {errno}"));
            // The kernel panics when PID 1 ends, and the VMM sees that.
            std::process::exit(1)
        }
    }
}

/// A line on the console, from before there is any other way to be heard.
pub fn say(line: &str) {
    let line = format!("drupe-agent: {line}\n");
    let console = fs::OpenOptions::new().write(true).open("/dev/console");
    let written = console.and_then(|mut console| console.write_all(line.as_bytes()));
    if written.is_err() {
        eprint!("{line}");
    }
}
