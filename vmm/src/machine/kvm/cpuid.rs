//! What CPUID tells the guest: of what KVM supports, the leaves listed here and
//! no others. The topology is one thread a core, all in one package. Nothing
//! identifies the host: no serial number, no brand, no counters of its
//! performance, power or temperature; and no means to run guests inside.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Twelve words over leaves 0x8000_0002 to 4, padded with zeroes.
const BRAND: &[u8; 48] =
    b"drupe virtual CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// KVM's own leaves, with those of its variants.
const HYPERVISOR: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_00ff;
const EXTENDED: u32 = 0x8000_0000;

/// Which processor a table is for.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// APIC id; the number of the processor.
    pub id: u8,
    pub vcpus: u8,
    /// The in-kernel local APIC has the TSC-deadline timer.
    pub tsc_deadline: bool,
}

impl Place {
    /// Bits of an APIC id that count cores.
    fn core_bits(self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }
}

/// The table for one processor out of what KVM supports.
pub fn for_guest(supported: &[kvm_cpuid_entry2], place: Place) -> Vec<kvm_cpuid_entry2> {
    let mut table: Vec<_> = supported
        .iter()
        .filter_map(|&entry| leaf(entry, place))
        .collect();
    table.extend(topology(place));
    for base in [0, EXTENDED] {
        let last = table
            .iter()
            .map(|entry| entry.function)
            .filter(|function| (base..base + 0x1000_0000).contains(function))
            .max();
        let first = table.iter_mut().find(|entry| entry.function == base);
        if let (Some(first), Some(last)) = (first, last) {
            first.eax = last;
        }
    }
    table
}

fn leaf(mut entry: kvm_cpuid_entry2, place: Place) -> Option<kvm_cpuid_entry2> {
    let id = u32::from(place.id);
    let vcpus = u32::from(place.vcpus);
    let e = &mut entry;
    match e.function {
        // Vendor and last leaf; cache descriptors; XSAVE; TSC frequency;
        // matrix tiles; vector extensions.
        0x0 | 0x2 | 0xd | 0x15 | 0x1d | 0x1e | 0x24 => {}
        0x1 => {
            // CLFLUSH's line size is the host's.
            e.ebx = e.ebx & 0xff00 | vcpus << 16 | id << 24;
            // MONITOR, VMX, SMX, EIST, TM2, PDCM, DCA.
            e.ecx &= !bits(&[3, 5, 6, 7, 8, 15, 18]);
            // x2APIC, hypervisor.
            e.ecx |= bits(&[21, 31]);
            set(&mut e.ecx, 24, place.tsc_deadline);
            // PSN, DS, ACPI, TM, PBE.
            e.edx &= !bits(&[18, 21, 22, 29, 31]);
            set(&mut e.edx, 28, vcpus > 1);
        }
        0x4 | 0x8000_001d => share_cache(e, vcpus),
        // The local APIC's timer does not stop.
        0x6 => keep(e, [bits(&[2]), 0, 0, 0]),
        0x7 if e.index == 0 => {
            // SGX, RDT-M, RDT-A, processor trace.
            e.ebx &= !bits(&[2, 12, 15, 25]);
            // Key locker, SGX launch control.
            e.ecx &= !bits(&[23, 30]);
            // Hybrid, PCONFIG, architectural LBRs.
            e.edx &= !bits(&[15, 18, 19]);
        }
        0x7 => {}
        function if HYPERVISOR.contains(&function) => {}
        // Last extended leaf; caches, 1 GiB pages' TLBs, hints.
        EXTENDED | 0x8000_0005 | 0x8000_0006 | 0x8000_0019 | 0x8000_001a | 0x8000_0021 => {}
        0x8000_0001 => {
            // CmpLegacy (the topology is in leaf 0xb), SVM, IBS, SKINIT, WDT,
            // LWP, four kinds of counters, MONITORX.
            e.ecx &= !bits(&[1, 2, 10, 12, 13, 15, 23, 24, 27, 28, 29]);
        }
        0x8000_0002..=0x8000_0004 => {
            let at = (e.function - 0x8000_0002) as usize * 16;
            let word = |n: usize| {
                let at = at + 4 * n;
                u32::from_le_bytes([BRAND[at], BRAND[at + 1], BRAND[at + 2], BRAND[at + 3]])
            };
            [e.eax, e.ebx, e.ecx, e.edx] = [word(0), word(1), word(2), word(3)];
        }
        // The TSC's rate does not change.
        0x8000_0007 => keep(e, [0, 0, 0, bits(&[8])]),
        0x8000_0008 => e.ecx = (vcpus - 1) | place.core_bits() << 12,
        0x8000_001e => [e.eax, e.ebx, e.ecx, e.edx] = [id, id, 0, 0],
        _ => return None,
    }
    Some(entry)
}

/// Leaf 0xb: threads, then cores, then nothing.
fn topology(place: Place) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: place.id.into(),
        ..kvm_cpuid_entry2::default()
    };
    [
        level(0, 1, 0, 1),
        level(1, 2, place.core_bits(), place.vcpus.into()),
        level(2, 0, 0, 0),
    ]
}

/// First and second level belong to one core, the third to all.
fn share_cache(e: &mut kvm_cpuid_entry2, vcpus: u32) {
    const LEVEL: u32 = 0x7 << 5;
    let level = (e.eax & LEVEL) >> 5;
    if e.eax & 0x1f == 0 {
        return;
    }
    let sharers = if level >= 3 { vcpus } else { 1 };
    let cores = if e.function == 0x4 { vcpus } else { 1 };
    e.eax = e.eax & 0x3fff | (sharers - 1) << 14 | (cores - 1) << 26;
}

fn keep(e: &mut kvm_cpuid_entry2, [eax, ebx, ecx, edx]: [u32; 4]) {
    e.eax &= eax;
    e.ebx &= ebx;
    e.ecx &= ecx;
    e.edx &= edx;
}

fn set(word: &mut u32, bit: u32, on: bool) {
    if on {
        *word |= 1 << bit;
    } else {
        *word &= !(1 << bit);
    }
}

const fn bits(numbers: &[u32]) -> u32 {
    let mut mask = 0;
    let mut at = 0;
    while at < numbers.len() {
        mask |= 1 << numbers[at];
        at += 1;
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that says yes to everything in every leaf.
    fn boastful() -> Vec<kvm_cpuid_entry2> {
        let leaves = (0..=0x40).chain(0x4000_0000..=0x4000_0001);
        leaves
            .chain(0x8000_0000..=0x8000_0030)
            .map(|function| kvm_cpuid_entry2 {
                function,
                eax: u32::MAX,
                ebx: u32::MAX,
                ecx: u32::MAX,
                edx: u32::MAX,
                ..kvm_cpuid_entry2::default()
            })
            .collect()
    }

    fn table(id: u8, vcpus: u8) -> Vec<kvm_cpuid_entry2> {
        let tsc_deadline = true;
        let place = Place {
            id,
            vcpus,
            tsc_deadline,
        };
        for_guest(&boastful(), place)
    }

    fn find(table: &[kvm_cpuid_entry2], function: u32) -> &kvm_cpuid_entry2 {
        table.iter().find(|e| e.function == function).unwrap()
    }

    #[test]
    fn the_host_cannot_be_told_by_its_leaves() {
        let table = table(0, 2);
        for hidden in [
            0x3,
            0x5,
            0xa,
            0xf,
            0x10,
            0x12,
            0x14,
            0x17,
            0x1f,
            0x8000_000a,
        ] {
            assert!(table.iter().all(|e| e.function != hidden), "{hidden:#x}");
        }
        assert_eq!(find(&table, 0).eax, 0x24);
        assert_eq!(find(&table, EXTENDED).eax, 0x8000_0021);
        assert_eq!(find(&table, 0x8000_0002).eax, u32::from_le_bytes(*b"drup"));
        let features = find(&table, 1);
        assert_eq!(features.ecx & bits(&[5]), 0, "VMX");
        assert_eq!(features.edx & bits(&[18]), 0, "serial number");
        assert_ne!(features.ecx & bits(&[31]), 0, "hypervisor");
        assert_eq!(find(&table, 0x8000_0001).ecx & bits(&[2]), 0, "SVM");
    }

    #[test]
    fn every_processor_knows_its_place() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (32, 5)] {
            for id in 0..vcpus {
                let table = table(id, vcpus);
                assert_eq!(find(&table, 1).ebx >> 24, u32::from(id));
                let levels: Vec<_> = table.iter().filter(|e| e.function == 0xb).collect();
                assert_eq!(levels.len(), 3);
                assert_eq!((levels[1].eax, levels[1].ebx), (bits, vcpus.into()));
                assert!(levels.iter().all(|level| level.edx == u32::from(id)));
            }
        }
    }
}
