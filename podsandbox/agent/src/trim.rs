//! Gives the host back what containers have deleted: the scratch disk is a
//! sparse file there, whose blocks stay taken until the guest discards them.
//!
//! In one go every so often rather than with each deletion, which would wait
//! for the host once for every file.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use nix::sys::stat::{major, minor};
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
/// The kernel counts in these, whatever the disk's own are.
const SECTOR: u64 = 512;

/// Whether something may have been deleted since the last time: more is free
/// than at some time since, or as much was written as could have been written
/// and deleted in between.
#[derive(Debug, Default)]
struct Looks {
    written: u64,
    /// The lowest since.
    free: Option<u64>,
}

impl Looks {
    fn is_worth(&mut self, free: u64, written: u64) -> bool {
        let lowest = self.free.map_or(free, |lowest| lowest.min(free));
        let is_worth =
            free - lowest >= WORTH_BYTES || written.saturating_sub(self.written) >= WORTH_BYTES;
        if is_worth {
            self.written = written;
        }
        self.free = Some(if is_worth { free } else { lowest });
        is_worth
    }
}

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
    let mut looks = Looks::default();
    loop {
        sleep(EVERY).await;
        match look() {
            Ok((free, written)) if looks.is_worth(free, written) => {}
            Ok(_) => continue,
            Err(error) => {
                eprintln!("drupe-agent: {SCRATCH}: {error}");
                continue;
            }
        }
        match spawn_blocking(trim).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return,
            Ok(Err(error)) => eprintln!("drupe-agent: cannot trim {SCRATCH}: {error}"),
            // The guest is ending.
            Err(_) => return,
        }
    }
}

/// Bytes that are free on the disk, and those that were written to it so far.
fn look() -> io::Result<(u64, u64)> {
    let stat = statvfs(SCRATCH)?;
    let free = stat.blocks_free().saturating_mul(stat.fragment_size());
    let device = fs::metadata(SCRATCH)?.dev();
    let path = format!("/sys/dev/block/{}:{}/stat", major(device), minor(device));
    let written = sectors_written(&fs::read_to_string(path)?);
    let written = written.ok_or(io::ErrorKind::InvalidData)?;
    Ok((free, written.saturating_mul(SECTOR)))
}

/// The seventh field (Documentation/block/stat.rst of Linux).
fn sectors_written(stat: &str) -> Option<u64> {
    stat.split_whitespace().nth(6)?.parse().ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn sectors_are_read_by_their_column() {
        let stat = "   12   3   400  5   67  8   9000   10   0   11   12   13   14   15   16\n";
        assert_eq!(sectors_written(stat), Some(9000));
        assert_eq!(sectors_written("1 2 3"), None);
    }

    #[test]
    fn what_was_written_and_deleted_between_two_looks_is_given_back_too() {
        let mut looks = Looks::default();
        assert!(!looks.is_worth(1000 * MIB, MIB));
        // 200 MiB came and went.
        assert!(looks.is_worth(1000 * MIB, 201 * MIB));
        assert!(!looks.is_worth(1000 * MIB, 202 * MIB));
        // Others came, a while ago, and go.
        assert!(looks.is_worth(800 * MIB, 402 * MIB));
        assert!(!looks.is_worth(800 * MIB, 402 * MIB));
        assert!(looks.is_worth(1000 * MIB, 402 * MIB));
        assert!(!looks.is_worth(1010 * MIB, 402 * MIB));
    }
}
