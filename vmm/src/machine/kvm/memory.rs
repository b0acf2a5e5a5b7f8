//! The guest's memory: private anonymous mappings, filled by what the guest
//! touches.

use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};
use vmm_client::HugePages;

use super::layout::ram;

const HUGE_PAGE_MIB: u32 = 2;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot map {mib} MiB of guest memory{}", hint(*.pages))]
    Map {
        mib: u32,
        pages: HugePages,
        source: io::Error,
    },
    #[error("KVM does not take the guest's memory")]
    Register(#[source] io::Error),
}

fn hint(pages: HugePages) -> &'static str {
    match pages {
        HugePages::Reserved => " in reserved huge pages (vm.nr_hugepages)",
        HugePages::Off | HugePages::Transparent => "",
    }
}

/// Maps `mib` MiB.
pub fn map(mib: u32, pages: HugePages) -> Result<GuestMemoryMmap, MemoryError> {
    let failed = |source| MemoryError::Map { mib, pages, source };
    let whole = match pages {
        HugePages::Reserved => mib.next_multiple_of(HUGE_PAGE_MIB),
        HugePages::Off | HugePages::Transparent => mib,
    };
    let regions = ram(u64::from(whole) << 20)
        .into_iter()
        .map(|(start, len)| map_region(start, len, pages))
        .collect::<io::Result<Vec<_>>>()
        .map_err(failed)?;
    GuestMemoryMmap::from_regions(regions).map_err(|e| failed(io::Error::other(e)))
}

fn map_region(start: GuestAddress, len: u64, pages: HugePages) -> io::Result<GuestRegionMmap> {
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    flags |= match pages {
        // Without a reservation the guest would get a SIGBUS when they run out.
        HugePages::Reserved => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        HugePages::Off | HugePages::Transparent => libc::MAP_NORESERVE,
    };
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let region = MmapRegion::build(None, len, protection, flags).map_err(io::Error::other)?;
    if pages == HugePages::Transparent {
        advise(&region, libc::MADV_HUGEPAGE)?;
    }
    // A pod's secrets do not belong into an image of the VMM.
    advise(&region, libc::MADV_DONTDUMP)?;
    GuestRegionMmap::new(region, start).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn advise(region: &MmapRegion, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: pointer and length are those of a live mapping; the advice
    // changes how it is backed, not what it holds.
    match unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the memory to the virtual machine.
pub fn register(vm: &VmFd, mem: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(mem.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for as long as `mem` or a clone of it
        // lives, and whoever runs the machine's processors holds one.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|e| MemoryError::Register(e.into()))?;
    }
    Ok(())
}

/// Bytes of all regions.
pub fn size(mem: &GuestMemoryMmap) -> u64 {
    mem.iter().map(GuestMemoryRegion::len).sum()
}

/// The end of RAM below the hole.
pub fn low_end(mem: &GuestMemoryMmap) -> u64 {
    size(mem).min(super::layout::RAM_STOPS)
}
