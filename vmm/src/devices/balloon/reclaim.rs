//! Pages of guest memory back to the host.

use std::io;

use nix::errno::Errno;
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

/// The balloon's unit and the host's page.
pub const PAGE: u64 = 4096;

/// Gives back a range of whole pages and returns how many bytes of it went;
/// what lies outside of memory is left out. The guest finds zeroes there when
/// it next looks (in memory that is a private copy of a file: that file's
/// bytes; the balloon promises neither).
pub fn give_back(mem: &GuestMemoryMmap, addr: GuestAddress, len: u64) -> (u64, io::Result<()>) {
    let mut given = 0;
    for region in mem.iter() {
        // The part of the range that this region holds.
        let base = region.start_addr().0;
        let start = addr.0.max(base);
        let end = addr.0.saturating_add(len);
        let end = end.min(region.last_addr().raw_value().saturating_add(1));
        if start >= end {
            continue;
        }
        // Anonymous private pages are dropped. In a shared file that would
        // only unmap them: there the file gets a hole.
        let advice = match region.flags() & libc::MAP_SHARED {
            0 => libc::MADV_DONTNEED,
            _ => libc::MADV_REMOVE,
        };
        let (offset, count) = ((start - base) as usize, (end - start) as usize);
        // SAFETY: the range lies within this region's mapping, by the bounds
        // above; the mapping lives as long as `mem`. Guest memory is only ever
        // accessed as volatile, so that its bytes may change at any time.
        let result = unsafe {
            let at = region.as_ptr().add(offset);
            libc::madvise(at.cast(), count, advice)
        };
        if let Err(e) = Errno::result(result) {
            return (given, Err(e.into()));
        }
        given += count as u64;
    }
    (given, Ok(()))
}
