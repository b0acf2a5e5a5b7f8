//! Where things lie in the guest's physical address space.
//!
//! ```text
//! 0x0000_0500  global descriptor table (64-bit entry only)
//! 0x0000_6000  PVH start info, modules, memory map
//! 0x0000_7000  zero page (64-bit entry only)
//! 0x0000_8000  stack of the entry, growing down
//! 0x0000_9000  page tables (64-bit entry only)
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  MP table, to the end of conventional memory
//! 0x0010_0000  RAM: kernel; initramfs at the top of low memory
//! 0xc000_0000  no RAM up to 4 GiB
//! 0xd000_0000  virtio-mmio windows, 4 KiB each
//! 0xfec0_0000  IOAPIC          0xfee0_0000  local APICs
//! 0xfffb_c000  KVM's own pages
//! 0x1_0000_0000  RAM beyond 3 GiB
//! ```

use vm_memory::GuestAddress;

pub const GDT: GuestAddress = GuestAddress(0x500);
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
pub const MODULES: GuestAddress = GuestAddress(0x6100);
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x6200);
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
pub const STACK: GuestAddress = GuestAddress(0x8ff0);
pub const PML4: GuestAddress = GuestAddress(0x9000);
pub const PDPT: GuestAddress = GuestAddress(0xa000);
pub const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// COMMAND_LINE_SIZE of x86 Linux, its terminating zero included.
pub const COMMAND_LINE_SIZE: usize = 2048;
/// Linux looks for the MP table in the last KiB of conventional memory.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
pub const MP_TABLE_SIZE: usize = 1024;
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// RAM stops here and goes on at [`RAM_AGAIN`].
pub const RAM_STOPS: u64 = 0xc000_0000;
pub const RAM_AGAIN: u64 = 0x1_0000_0000;

pub const MMIO: u64 = 0xd000_0000;

pub const IO_APIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page for real mode on old Intel CPUs, then three for their task state.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub const KVM_TSS: usize = 0xfffb_d000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_GSI: u32 = 4;
/// The keyboard controller: all it does here is reset the machine.
pub const KEYBOARD_DATA: u16 = 0x60;
pub const KEYBOARD_COMMAND: u16 = 0x64;
pub const KEYBOARD_RESET: u8 = 0xfe;

/// IOAPIC pins for devices: not those of timer, keyboard, cascade, serial
/// ports, clock and FPU of a PC.
const DEVICE_GSIS: [u32; 17] = [
    5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
];

/// IOAPIC pins in all.
pub const GSIS: u32 = 24;

/// The pin of device `index`. Beyond 17 devices pins are shared, which is
/// sound: an edge that comes while the guest handles another one is kept.
pub fn device_gsi(index: usize) -> u32 {
    DEVICE_GSIS[index % DEVICE_GSIS.len()]
}

/// Start and length of each piece of RAM, for `bytes` of it.
pub fn ram(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(RAM_STOPS);
    let mut pieces = vec![(GuestAddress(0), low)];
    if bytes > low {
        pieces.push((GuestAddress(RAM_AGAIN), bytes - low));
    }
    pieces
}

/// A line of the memory map (E820 and PVH use the same types).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    pub start: u64,
    pub len: u64,
    pub kind: u32,
}

pub const KIND_RAM: u32 = 1;
pub const KIND_RESERVED: u32 = 2;

/// What the guest's kernel may use of `bytes` of RAM.
pub fn memory_map(bytes: u64) -> Vec<MapEntry> {
    let entry = |start: u64, end: u64, kind| MapEntry {
        start,
        len: end - start,
        kind,
    };
    let low = bytes.min(RAM_STOPS);
    let mut map = vec![
        entry(0, MP_TABLE.0, KIND_RAM),
        entry(MP_TABLE.0, HIGH_MEMORY.0, KIND_RESERVED),
        entry(HIGH_MEMORY.0, low, KIND_RAM),
    ];
    if bytes > low {
        map.push(entry(RAM_AGAIN, RAM_AGAIN + bytes - low, KIND_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(ram(GIB), [(GuestAddress(0), GIB)]);
        assert_eq!(ram(3 * GIB), [(GuestAddress(0), 3 * GIB)]);
        assert_eq!(
            ram(5 * GIB),
            [(GuestAddress(0), 3 * GIB), (GuestAddress(4 * GIB), 2 * GIB)]
        );
    }

    #[test]
    fn the_map_covers_all_memory_but_what_is_ours() {
        for gib in [1, 3, 4, 64] {
            let map = memory_map(gib * GIB);
            let usable: u64 = map
                .iter()
                .filter(|e| e.kind == KIND_RAM)
                .map(|e| e.len)
                .sum();
            assert_eq!(usable, gib * GIB - (HIGH_MEMORY.0 - MP_TABLE.0));
            assert!(map.is_sorted_by_key(|e| e.start));
        }
    }
}
