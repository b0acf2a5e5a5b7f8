//! Puts kernel, initramfs and command line into the guest's memory.
//!
//! The kernel's file decides how it is entered: vmlinux by its PVH entry,
//! bzImage by the 64-bit boot protocol. Of the file nothing is taken for
//! granted: a handler may name any.

use std::fs::File;
use std::io::{self, Read, Seek};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout::{COMMAND_LINE, COMMAND_LINE_SIZE, HIGH_MEMORY};
use super::memory::{low_end, size};

const ELF_MAGIC: &[u8] = b"\x7fELF";
/// Where bzImage has its own (Linux' Documentation/arch/x86/boot.rst).
const BZIMAGE_MAGIC_AT: usize = 0x202;
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
/// XLF_KERNEL_64: has an entry at 0x200 for processors in long mode.
const LONG_MODE_ENTRY: u16 = 1;
const LONG_MODE_ENTRY_AT: u64 = 0x200;
const PAGE: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("the guest kernel's file cannot be read")]
    ReadKernel(#[source] io::Error),
    #[error("the guest kernel is neither an ELF image with a PVH entry nor a bzImage")]
    NoKernel,
    #[error(
        "the guest kernel has no PVH entry; one for kvm is built with CONFIG_PVH, one for uml does not run there"
    )]
    NoPvh,
    #[error("the guest kernel is a bzImage without an entry for 64-bit loaders")]
    No64BitEntry,
    #[error("the guest kernel's file is broken, or larger than the guest's memory of {mib} MiB")]
    Broken {
        mib: u64,
        source: linux_loader::loader::Error,
    },
    #[error("the guest kernel needs memory up to {end:#x}, the guest's memory is {mib} MiB")]
    KernelTooLarge { end: u64, mib: u64 },
    #[error("the initramfs cannot be read")]
    ReadInitramfs(#[source] io::Error),
    #[error(
        "the initramfs of {len} bytes does not fit into the guest's memory of {mib} MiB beside its kernel"
    )]
    InitramfsTooLarge { len: u64, mib: u64 },
    #[error(
        "the guest kernel's command line has {len} characters, it takes {}",
        COMMAND_LINE_SIZE - 1
    )]
    CommandLineTooLong { len: usize },
    #[error("the guest's memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// How the first processor enters the kernel.
#[derive(Debug)]
pub enum Entry {
    /// In 32-bit protected mode, at this address.
    Pvh(GuestAddress),
    /// In long mode, with this header of the zero page.
    Long(GuestAddress, Box<setup_header>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initramfs {
    pub start: GuestAddress,
    pub len: u64,
}

/// What is in memory now.
#[derive(Debug)]
pub struct Loaded {
    pub entry: Entry,
    pub initramfs: Initramfs,
    pub command_line_len: usize,
}

pub fn load(
    mem: &GuestMemoryMmap,
    mut kernel: File,
    initramfs: File,
    command_line: &str,
) -> Result<Loaded, LoadError> {
    let (entry, kernel_end, initramfs_limit) = load_kernel(mem, &mut kernel)?;
    let initramfs = load_initramfs(mem, initramfs, kernel_end, initramfs_limit)?;
    if command_line.len() >= COMMAND_LINE_SIZE {
        return Err(LoadError::CommandLineTooLong {
            len: command_line.len(),
        });
    }
    mem.write_slice(command_line.as_bytes(), COMMAND_LINE)?;
    let end = GuestAddress(COMMAND_LINE.0 + command_line.len() as u64);
    mem.write_obj(0u8, end)?;
    Ok(Loaded {
        entry,
        initramfs,
        command_line_len: command_line.len(),
    })
}

/// Entry, the end of what the kernel uses before it reads its memory map, and
/// the address below which the initramfs has to lie.
fn load_kernel(mem: &GuestMemoryMmap, kernel: &mut File) -> Result<(Entry, u64, u64), LoadError> {
    let mut head = Vec::new();
    kernel
        .take((BZIMAGE_MAGIC_AT + BZIMAGE_MAGIC.len()) as u64)
        .read_to_end(&mut head)
        .map_err(LoadError::ReadKernel)?;
    kernel.rewind().map_err(LoadError::ReadKernel)?;
    let mib = size(mem) >> 20;
    let broken = |source| LoadError::Broken { mib, source };
    let (entry, end, limit) = if head.starts_with(ELF_MAGIC) {
        let loaded = Elf::load(mem, None, kernel, None).map_err(broken)?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(LoadError::NoPvh);
        };
        (Entry::Pvh(entry), loaded.kernel_end, u64::MAX)
    } else if head.get(BZIMAGE_MAGIC_AT..) == Some(BZIMAGE_MAGIC) {
        let loaded = BzImage::load(mem, None, kernel, Some(HIGH_MEMORY)).map_err(broken)?;
        bzimage(&loaded)?
    } else {
        return Err(LoadError::NoKernel);
    };
    if end > low_end(mem) {
        return Err(LoadError::KernelTooLarge { end, mib });
    }
    Ok((entry, end, limit))
}

fn bzimage(loaded: &KernelLoaderResult) -> Result<(Entry, u64, u64), LoadError> {
    let Some(header) = loaded.setup_header else {
        return Err(LoadError::NoKernel);
    };
    if header.xloadflags & LONG_MODE_ENTRY == 0 {
        return Err(LoadError::No64BitEntry);
    }
    // It unpacks itself to there.
    let unpacked = header.pref_address.checked_add(header.init_size.into());
    let end = unpacked.unwrap_or(u64::MAX).max(loaded.kernel_end);
    let entry = GuestAddress(loaded.kernel_load.0 + LONG_MODE_ENTRY_AT);
    let limit = u64::from(header.initrd_addr_max) + 1;
    Ok((Entry::Long(entry, Box::new(header)), end, limit))
}

/// At the top of low memory, where no kernel unpacks itself.
fn load_initramfs(
    mem: &GuestMemoryMmap,
    mut file: File,
    kernel_end: u64,
    limit: u64,
) -> Result<Initramfs, LoadError> {
    let len = file.metadata().map_err(LoadError::ReadInitramfs)?.len();
    let top = low_end(mem).min(limit);
    let start = top.checked_sub(len).map(|start| start & !(PAGE - 1));
    let Some(start) = start.filter(|&start| start >= kernel_end.next_multiple_of(PAGE)) else {
        let mib = size(mem) >> 20;
        return Err(LoadError::InitramfsTooLarge { len, mib });
    };
    let start = GuestAddress(start);
    let count = usize::try_from(len).map_err(|e| LoadError::ReadInitramfs(io::Error::other(e)))?;
    mem.read_exact_volatile_from(start, &mut file, count)?;
    Ok(Initramfs { start, len })
}

#[cfg(test)]
mod tests;
