//! Files that are kernels and files that are none. `tests/kvm` runs some.

use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::machine::kvm::layout::memory_map;

const MIB: u64 = 1 << 20;

fn memory(mib: u64) -> GuestMemoryMmap {
    let ranges: Vec<_> = crate::machine::kvm::layout::ram(mib * MIB)
        .into_iter()
        .map(|(start, len)| (start, len as usize))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// A bzImage of one setup sector and `payload`.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[BZIMAGE_MAGIC_AT..][..4].copy_from_slice(BZIMAGE_MAGIC);
    // Version 2.15, loaded high, at 1 MiB.
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x236..0x238].copy_from_slice(&LONG_MODE_ENTRY.to_le_bytes());
    // Unpacked at 16 MiB, 8 MiB long.
    image[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes());
    image[0x260..0x264].copy_from_slice(&(8 * MIB as u32).to_le_bytes());
    image.extend(payload);
    image
}

fn try_load(mem: &GuestMemoryMmap, kernel: &[u8], initramfs: &[u8]) -> Result<Loaded, LoadError> {
    load(mem, file(kernel), file(initramfs), "quiet")
}

#[test]
fn a_bzimage_lies_at_1_mib_and_its_initramfs_at_the_top() {
    let mem = memory(64);
    let loaded = try_load(&mem, &bzimage(&[7; 5000]), &[9; 5000]).unwrap();
    let Entry::Long(entry, header) = loaded.entry else {
        panic!("{loaded:?}");
    };
    assert_eq!(entry.0, 0x10_0200);
    assert_eq!({ header.version }, 0x20f);
    assert_eq!(mem.read_obj::<u8>(GuestAddress(0x10_0000)).unwrap(), 7);
    let start = loaded.initramfs.start.0;
    assert_eq!(start, 64 * MIB - 8192);
    assert_eq!(mem.read_obj::<u8>(loaded.initramfs.start).unwrap(), 9);
    assert_eq!(mem.read_obj::<[u8; 6]>(COMMAND_LINE).unwrap(), *b"quiet\0");
}

#[test]
fn an_initramfs_stays_below_the_hole_and_the_kernels_limit() {
    let mem = memory(5 << 10);
    let loaded = try_load(&mem, &bzimage(&[0; 100]), &[9; 100]).unwrap();
    assert_eq!(loaded.initramfs.start.0, 0x8000_0000 - 4096);
    let usable = memory_map(size(&mem)).into_iter().any(|entry| {
        let start = loaded.initramfs.start.0;
        start >= entry.start && start + 100 <= entry.start + entry.len
    });
    assert!(usable);
}

#[test]
fn an_initramfs_never_lies_in_the_way_of_the_kernel() {
    // 24 MiB are the kernel's when it has unpacked itself.
    let mem = memory(32);
    let fits = vec![0; 8 * MIB as usize];
    try_load(&mem, &bzimage(&[0; 100]), &fits).unwrap();
    let error = try_load(&mem, &bzimage(&[0; 100]), &[&fits[..], &[0]].concat()).unwrap_err();
    assert!(
        matches!(error, LoadError::InitramfsTooLarge { len, mib: 32 } if len == 8 * MIB + 1),
        "{error}"
    );
    let error = try_load(&memory(16), &bzimage(&[0; 100]), &[]).unwrap_err();
    assert!(
        matches!(error, LoadError::KernelTooLarge { mib: 16, .. }),
        "{error}"
    );
}

#[test]
fn a_bzimage_for_32_bit_loaders_only_is_named() {
    let mut image = bzimage(&[0; 100]);
    image[0x236] = 0;
    let error = try_load(&memory(64), &image, &[]).unwrap_err();
    assert!(error.to_string().contains("64-bit"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// A file's bytes decide whether it is taken, never what becomes of us.
    #[test]
    fn no_file_confuses_the_loader(
        changes in prop::collection::vec((0usize..1200, any::<u8>()), 0..40),
        elf in any::<bool>(),
    ) {
        let mut image = if elf { small_elf() } else { bzimage(&[0; 100]) };
        for (at, value) in changes {
            if let Some(byte) = image.get_mut(at) {
                *byte = value;
            }
        }
        let mem = memory(32);
        if let Ok(loaded) = try_load(&mem, &image, &[1; 100]) {
            prop_assert!(loaded.initramfs.start.0 + 100 <= 32 * MIB);
        }
    }
}

/// An ELF header with a segment to load and one of notes.
fn small_elf() -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0x10_0000u64, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    for (kind, offset, len) in [(4u32, 176u64, 20u64), (1, 196, 64)] {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for word in [offset, 0x10_0000, 0x10_0000, len, len, 4] {
            image.extend(word.to_le_bytes());
        }
    }
    for word in [4u32, 4, 18] {
        image.extend(word.to_le_bytes());
    }
    image.extend(b"Xen\0");
    image.extend(0x10_0000u32.to_le_bytes());
    image.resize(260, 0);
    image
}
