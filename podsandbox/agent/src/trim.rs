//! Gives the host back what containers have deleted: the scratch disk is a
//! sparse file there, whose blocks stay taken until the guest discards them.
//!
//! In one go every so often rather than with each deletion, which would wait
//! for the host once for every file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::rootfs::SCRATCH;

/// The daemon takes what is missing for longer than a minute for used.
const EVERY: Duration = Duration::from_secs(30);
/// Less is not worth a walk over the disk's groups.
const WORTH_BYTES: u64 = 16 << 20;
/// Nor is a smaller piece worth a request.
const MIN_PIECE: u64 = 64 << 10;

/// `struct fstrim_range` of linux/fs.h.
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
    min_length: u64,
}

/// `_IOWR('X', 121, struct fstrim_range)`
const FITRIM: libc::Ioctl = 0xc018_5879_u32 as libc::Ioctl;

/// Goes on for as long as the guest lives, unless the host takes nothing back.
pub async fn keep() {
    let mut lowest = u64::MAX;
    loop {
        sleep(EVERY).await;
        let free = match statvfs(SCRATCH) {
            Ok(stat) => stat.blocks_free().saturating_mul(stat.fragment_size()),
            Err(error) => {
                eprintln!("drupe-agent: {SCRATCH}: {error}");
                continue;
            }
        };
        lowest = lowest.min(free);
        if free - lowest < WORTH_BYTES {
            continue;
        }
        match spawn_blocking(trim).await {
            Ok(Ok(())) => lowest = free,
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return,
            Ok(Err(error)) => eprintln!("drupe-agent: cannot trim {SCRATCH}: {error}"),
            // The guest is ending.
            Err(_) => return,
        }
    }
}

fn trim() -> io::Result<()> {
    let scratch = File::open(SCRATCH)?;
    let mut range = Range {
        start: 0,
        length: u64::MAX,
        min_length: MIN_PIECE,
    };
    // SAFETY: FITRIM reads and writes one fstrim_range, which lives, and the
    // descriptor is open.
    let result = unsafe { libc::ioctl(scratch.as_raw_fd(), FITRIM, &raw mut range) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
