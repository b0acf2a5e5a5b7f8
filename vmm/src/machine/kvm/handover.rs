//! What the guest's kernel finds in memory when it is entered, and the
//! processor's registers at that moment.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{
    COMMAND_LINE, GDT, MEMORY_MAP, MODULES, PAGE_DIRECTORY, PDPT, PML4, STACK, START_INFO,
    ZERO_PAGE, memory_map,
};
use super::load::{Entry, Initramfs, Loaded};
use super::memory::size;

/// XEN_HVM_START_MAGIC_VALUE.
const PVH_MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const PVH_VERSION: u32 = 1;

/// A boot loader without a number of its own (boot.rst: type_of_loader).
const LOADER_UNDEFINED: u8 = 0xff;

const CR0_PROTECTED: u64 = 1 << 0;
/// Always set on these processors.
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
/// Bit 1 is always set.
const RFLAGS: u64 = 2;

const TABLE_PRESENT_WRITABLE: u64 = 3;
/// Present, writable, 2 MiB.
const LARGE_PAGE: u64 = 0x83;
const LARGE_PAGE_LEN: u64 = 2 << 20;

/// Linux' __BOOT_CS and __BOOT_DS, which the 64-bit protocol asks for.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
/// Busy 32-bit (in long mode: 64-bit) task state; a processor has to have one.
const TYPE_TASK: u8 = 0xb;
const TASK_LIMIT: u32 = 0x67;

/// Writes the tables `loaded`'s entry asks for, and returns the general
/// registers.
pub fn write(mem: &GuestMemoryMmap, loaded: &Loaded) -> Result<kvm_regs, GuestMemoryError> {
    let mut regs = kvm_regs {
        rflags: RFLAGS,
        rsp: STACK.0,
        ..kvm_regs::default()
    };
    match &loaded.entry {
        Entry::Pvh(entry) => {
            write_start_info(mem, loaded.initramfs)?;
            regs.rip = entry.0;
            regs.rbx = START_INFO.0;
        }
        Entry::Long(entry, header) => {
            write_zero_page(mem, header, loaded)?;
            write_page_tables(mem)?;
            for (at, descriptor) in (0u64..).zip(long_mode_gdt()) {
                mem.write_obj(descriptor, GuestAddress(GDT.0 + 8 * at))?;
            }
            regs.rip = entry.0;
            regs.rsi = ZERO_PAGE.0;
        }
    }
    Ok(regs)
}

/// `sregs` of a fresh processor, changed to what the entry asks for.
pub fn system_registers(entry: &Entry, mut sregs: kvm_sregs) -> kvm_sregs {
    let long = matches!(entry, Entry::Long(..));
    sregs.cs = code(long);
    let data = data();
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = task();
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION;
    sregs.cr4 = 0;
    sregs.efer = 0;
    // PVH has none: its kernel loads its own before it loads a selector.
    sregs.gdt = kvm_dtable::default();
    sregs.idt = kvm_dtable::default();
    if long {
        sregs.cr0 |= CR0_PAGING;
        sregs.cr3 = PML4.0;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LONG | EFER_LONG_ACTIVE;
        sregs.gdt.base = GDT.0;
        sregs.gdt.limit = (8 * long_mode_gdt().len() - 1) as u16;
    }
    sregs
}

fn write_start_info(mem: &GuestMemoryMmap, initramfs: Initramfs) -> Result<(), GuestMemoryError> {
    let map = memory_map(size(mem));
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: PVH_VERSION,
        nr_modules: 1,
        modlist_paddr: MODULES.0,
        cmdline_paddr: COMMAND_LINE.0,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let module = hvm_modlist_entry {
        paddr: initramfs.start.0,
        size: initramfs.len,
        ..hvm_modlist_entry::default()
    };
    mem.write_obj(info, START_INFO)?;
    mem.write_obj(module, MODULES)?;
    let mut at = MEMORY_MAP;
    for entry in map {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.len,
            type_: entry.kind,
            reserved: 0,
        };
        mem.write_obj(entry, at)?;
        at.0 += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}

fn write_zero_page(
    mem: &GuestMemoryMmap,
    header: &setup_header,
    loaded: &Loaded,
) -> Result<(), GuestMemoryError> {
    let mut page = boot_params {
        hdr: *header,
        ..boot_params::default()
    };
    let initramfs = loaded.initramfs;
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = COMMAND_LINE.0 as u32;
    page.hdr.cmdline_size = loaded.command_line_len as u32;
    page.hdr.ramdisk_image = initramfs.start.0 as u32;
    page.ext_ramdisk_image = (initramfs.start.0 >> 32) as u32;
    page.hdr.ramdisk_size = initramfs.len as u32;
    page.ext_ramdisk_size = (initramfs.len >> 32) as u32;
    let map = memory_map(size(mem));
    page.e820_entries = map.len() as u8;
    for (to, from) in page.e820_table.iter_mut().zip(map) {
        *to = boot_e820_entry {
            addr: from.start,
            size: from.len,
            type_: from.kind,
        };
    }
    mem.write_obj(page, ZERO_PAGE)
}

/// The first GiB, each address mapped to itself.
fn write_page_tables(mem: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    mem.write_obj(PDPT.0 | TABLE_PRESENT_WRITABLE, PML4)?;
    mem.write_obj(PAGE_DIRECTORY.0 | TABLE_PRESENT_WRITABLE, PDPT)?;
    for index in 0..512 {
        let at = GuestAddress(PAGE_DIRECTORY.0 + 8 * index);
        mem.write_obj((index * LARGE_PAGE_LEN) | LARGE_PAGE, at)?;
    }
    Ok(())
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..kvm_segment::default()
    }
}

fn code(long: bool) -> kvm_segment {
    kvm_segment {
        db: (!long).into(),
        l: long.into(),
        ..segment(CODE, TYPE_CODE)
    }
}

fn data() -> kvm_segment {
    segment(DATA, TYPE_DATA)
}

fn task() -> kvm_segment {
    kvm_segment {
        limit: TASK_LIMIT,
        db: 0,
        s: 0,
        g: 0,
        ..segment(TASK, TYPE_TASK)
    }
}

/// Two empty, code, data, and a task state of two words.
fn long_mode_gdt() -> [u64; 6] {
    [
        0,
        0,
        descriptor(code(true)),
        descriptor(data()),
        descriptor(task()),
        0,
    ]
}

/// A segment as the processor reads it from memory (Intel SDM vol. 3, 3.4.5).
fn descriptor(segment: kvm_segment) -> u64 {
    let limit = if segment.g == 1 {
        u64::from(segment.limit >> 12)
    } else {
        u64::from(segment.limit)
    };
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_every_loader_has() {
        assert_eq!(descriptor(code(true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(data()), 0x00cf_9300_0000_ffff);
    }
}
