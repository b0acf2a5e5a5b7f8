//! The MP table (Intel MultiProcessor Specification 1.4): all the hardware
//! description there is. It names the processors, one IOAPIC and the wiring of
//! its pins; devices are named on the kernel's command line.

use vm_memory::{Bytes, GuestMemoryMmap};

use super::layout::{GSIS, IO_APIC, LOCAL_APIC, MP_TABLE, MP_TABLE_SIZE};

const POINTER_LEN: usize = 16;
const HEADER_LEN: usize = 44;
/// Version 1.4.
const SPEC: u8 = 4;
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// On-chip FPU and APIC; the kernel asks CPUID for the rest.
const FEATURES: u32 = 0x201;

const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
const ALL_APICS: u8 = 0xff;

/// Writes the table for `vcpus` processors.
pub fn write(mem: &GuestMemoryMmap, vcpus: u8) -> Result<(), vm_memory::GuestMemoryError> {
    mem.write_slice(&build(vcpus), MP_TABLE)
}

fn build(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::with_capacity(MP_TABLE_SIZE);
    let mut count = 0u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[PROCESSOR, id, LOCAL_APIC_VERSION, flags]);
        processor[8..12].copy_from_slice(&FEATURES.to_le_bytes());
        entry(&processor);
    }
    entry(b"\x01\x00ISA   ");
    let io_apic_id = vcpus;
    let mut io_apic = [IOAPIC, io_apic_id, IO_APIC_VERSION, ENABLED, 0, 0, 0, 0];
    io_apic[4..].copy_from_slice(&IO_APIC.to_le_bytes());
    entry(&io_apic);
    // Polarity and trigger as the bus has them: active high, edge.
    for gsi in 0..GSIS as u8 {
        entry(&[INTERRUPT, VECTORED, 0, 0, 0, gsi, io_apic_id, gsi]);
    }
    entry(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    entry(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_APICS, 1]);
    debug_assert_eq!(entries[usize::from(vcpus) * 20], BUS);

    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(b"PCMP");
    header[4..6].copy_from_slice(&((HEADER_LEN + entries.len()) as u16).to_le_bytes());
    header[6] = SPEC;
    header[8..16].copy_from_slice(b"DRUPE   ");
    header[16..28].copy_from_slice(b"MICROVM     ");
    header[34..36].copy_from_slice(&count.to_le_bytes());
    header[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    header[7] = checksum(header.iter().chain(&entries));

    let mut pointer = [0; POINTER_LEN];
    pointer[..4].copy_from_slice(b"_MP_");
    let table = MP_TABLE.0 as u32 + POINTER_LEN as u32;
    pointer[4..8].copy_from_slice(&table.to_le_bytes());
    // Its length in paragraphs.
    pointer[8] = 1;
    pointer[9] = SPEC;
    pointer[10] = checksum(&pointer);
    [&pointer[..], &header[..], &entries].concat()
}

/// What makes the sum of all bytes 0.
fn checksum<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> u8 {
    bytes
        .into_iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn tables_of_any_size_fit_and_add_up() {
        for vcpus in 1..=32 {
            let table = build(vcpus);
            assert!(table.len() <= MP_TABLE_SIZE, "{vcpus}: {}", table.len());
            assert_eq!(sum(&table[..POINTER_LEN]), 0);
            assert_eq!(sum(&table[POINTER_LEN..]), 0);
            let len = u16::from_le_bytes([table[20], table[21]]);
            assert_eq!(usize::from(len), table.len() - POINTER_LEN);
            let count = u16::from_le_bytes([table[50], table[51]]);
            assert_eq!(u32::from(count), u32::from(vcpus) + 2 + GSIS + 2);
        }
    }
}
