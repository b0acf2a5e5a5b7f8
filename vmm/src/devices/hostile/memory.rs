//! Guest memory with guard pages around it.

use std::ptr;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// The guest's regions: one, a hole, another.
pub(super) const REGIONS: [(u64, usize); 2] = [(0, 1 << 20), (2 << 20, 1 << 16)];

const GUARD: usize = 4096;
const MARK: u8 = 0xa5;
const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// One mapping: guard, region, guard, region, guard. Guards can be written,
/// by a system call of the device as well, and are looked at in the end.
pub(super) struct Guarded {
    base: *mut u8,
    len: usize,
}

impl Guarded {
    pub(super) fn new() -> std::io::Result<Self> {
        let len = REGIONS.iter().map(|r| r.1 + GUARD).sum::<usize>() + GUARD;
        // SAFETY: a new anonymous mapping, wherever the kernel likes.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, PROT, FLAGS, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let guarded = Self {
            base: base.cast(),
            len,
        };
        for at in guarded.guards() {
            // SAFETY: a guard lies within the mapping, by `guards`.
            unsafe { ptr::write_bytes(guarded.base.add(at), MARK, GUARD) };
        }
        Ok(guarded)
    }

    fn guards(&self) -> [usize; 3] {
        [0, GUARD + REGIONS[0].1, self.len - GUARD]
    }

    /// The regions. They must be out of use before `self` goes.
    pub(super) fn regions(&self) -> Option<GuestMemoryMmap> {
        let mut at = GUARD;
        let mut regions = Vec::new();
        for (start, size) in REGIONS {
            let builder = MmapRegionBuilder::new(size)
                .with_mmap_prot(PROT)
                .with_mmap_flags(FLAGS);
            // SAFETY: the range lies within the mapping, which lives as long
            // as `self`; the caller drops the regions before.
            let builder = unsafe { builder.with_raw_mmap_pointer(self.base.add(at)) };
            let mapping = builder.build().ok()?;
            regions.push(GuestRegionMmap::new(mapping, GuestAddress(start))?);
            at += size + GUARD;
        }
        GuestMemoryMmap::from_regions(regions).ok()
    }

    pub(super) fn is_unharmed(&self) -> bool {
        self.guards().into_iter().all(|at| {
            // SAFETY: as in `new`; nobody else knows of the guards.
            let guard = unsafe { std::slice::from_raw_parts(self.base.add(at), GUARD) };
            guard.iter().all(|&byte| byte == MARK)
        })
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`; its users are gone.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
