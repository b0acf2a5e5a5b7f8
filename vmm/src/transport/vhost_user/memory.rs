//! The guest's memory as the front end describes it.
//!
//! Every device's front end sends the same table; one mapping serves them all.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::wire::Region;
use crate::transport::invalid;

/// The last table that was mapped, shared by the devices of a machine.
#[derive(Default)]
pub struct Memory {
    last: Mutex<Option<(Vec<Key>, GuestMemoryMmap)>>,
}

/// A region of the file it lies in (device, inode).
type Key = (u64, u64, Region);

impl Memory {
    /// Maps a table, or finds it mapped already.
    pub fn map(&self, table: Vec<(Region, OwnedFd)>) -> io::Result<GuestMemoryMmap> {
        let mut keys = Vec::with_capacity(table.len());
        let mut files = Vec::with_capacity(table.len());
        for (region, fd) in table {
            // Ring addresses come as the front end's own virtual addresses.
            // UML's are its guest's physical ones; nothing else is supported.
            if region.user_addr != region.guest_addr {
                return Err(invalid("memory whose user and guest addresses differ"));
            }
            let file = File::from(fd);
            let meta = file.metadata()?;
            // An access past the file's end would be a SIGBUS.
            let end = region.mmap_offset.checked_add(region.size);
            if region.size == 0 || end.is_none_or(|end| end > meta.len()) {
                return Err(invalid("memory past the end of its file"));
            }
            keys.push((meta.dev(), meta.ino(), region));
            files.push((region, file));
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, mem)) = &*last
            && *known == keys
        {
            return Ok(mem.clone());
        }
        let mut regions = Vec::with_capacity(files.len());
        for (region, file) in files {
            let size = usize::try_from(region.size).map_err(io::Error::other)?;
            let at = GuestAddress(region.guest_addr);
            let file = FileOffset::new(file, region.mmap_offset);
            regions
                .push(GuestRegionMmap::from_range(at, size, Some(file)).map_err(io::Error::other)?);
        }
        regions.sort_by_key(vm_memory::GuestMemoryRegion::start_addr);
        let mem = GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?;
        *last = Some((keys, mem.clone()));
        Ok(mem)
    }
}
