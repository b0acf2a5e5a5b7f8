//! What a kernel's file is, told from its first bytes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// What a kernel's file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// vmlinux with a PVH entry, or bzImage.
    Kvm,
    /// Another executable: User Mode Linux, presumably.
    Uml,
    /// In words, why it is neither.
    No(String),
}

/// Program headers of an ELF file that are looked at.
const HEADERS_MAX: u16 = 64;
/// A kernel's notes take some hundred bytes.
const NOTES_MAX: u64 = 64 * 1024;
/// XEN_ELFNOTE_PHYS32_ENTRY: where a PVH loader enters.
const PVH_ENTRY: u32 = 18;

#[must_use]
pub fn kind_of(path: &Path) -> Kernel {
    let read = File::open(path).and_then(|mut file| look(&mut file));
    match read {
        Ok(Some(kernel)) => kernel,
        Ok(None) => Kernel::No(format!("{path:?} is no kernel")),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Kernel::No(format!("{path:?} is no kernel"))
        }
        Err(error) => Kernel::No(format!("guest kernel {path:?}: {error}")),
    }
}

fn look(file: &mut (impl Read + Seek)) -> io::Result<Option<Kernel>> {
    let mut head = [0; 0x206];
    file.read_exact(&mut head)?;
    // Documentation/arch/x86/boot.rst: boot sector magic and header magic.
    if head[0x1fe..0x200] == [0x55, 0xaa] && head[0x202..0x206] == *b"HdrS" {
        return Ok(Some(Kernel::Kvm));
    }
    // 64-bit, little-endian.
    if head[..6] != *b"\x7fELF\x02\x01" {
        return Ok(None);
    }
    let table = word64(&head, 32);
    let (size, count) = (word16(&head, 54), word16(&head, 56).min(HEADERS_MAX));
    for index in 0..u64::from(count) {
        let mut header = [0; 56];
        file.seek(SeekFrom::Start(
            table.saturating_add(index * u64::from(size)),
        ))?;
        file.read_exact(&mut header)?;
        const PT_NOTE: u32 = 4;
        if word32(&header, 0) != PT_NOTE {
            continue;
        }
        file.seek(SeekFrom::Start(word64(&header, 8)))?;
        let mut notes = Vec::new();
        file.take(word64(&header, 32).min(NOTES_MAX))
            .read_to_end(&mut notes)?;
        if has_pvh_entry(&notes) {
            return Ok(Some(Kernel::Kvm));
        }
    }
    Ok(Some(Kernel::Uml))
}

fn has_pvh_entry(mut notes: &[u8]) -> bool {
    while notes.len() >= 12 {
        let sizes = [word32(notes, 0) as usize, word32(notes, 4) as usize];
        let kind = word32(notes, 8);
        let name = &notes[12..];
        if kind == PVH_ENTRY && name.starts_with(b"Xen\0") {
            return true;
        }
        let [name_len, data_len] = sizes.map(|size| size.saturating_add(3) & !3);
        let Some(rest) = name_len
            .checked_add(data_len)
            .and_then(|len| name.get(len..))
        else {
            return false;
        };
        notes = rest;
    }
    false
}

fn word16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from(word16(bytes, at)) | u32::from(word16(bytes, at + 2)) << 16
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from(word32(bytes, at)) | u64::from(word32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn elf(note_name: &[u8; 4], note_type: u32) -> Vec<u8> {
        let mut file = vec![0; 0x300];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32] = 64; // program headers
        file[54] = 56;
        file[56] = 1;
        file[64] = 4; // PT_NOTE at 0x200
        file[64 + 8 + 1] = 2;
        file[64 + 32] = 40;
        file[0x200] = 4; // a note before it: name of 4, data of 3
        file[0x204] = 3;
        file[0x214] = 4;
        file[0x218] = 4;
        file[0x21c..0x220].copy_from_slice(&note_type.to_le_bytes());
        file[0x220..0x224].copy_from_slice(note_name);
        file
    }

    #[test]
    fn kernels_are_told_from_their_files() {
        let mut bzimage = vec![0; 0x300];
        bzimage[0x1fe..0x206].copy_from_slice(b"\x55\xaa\xeb\x66HdrS");
        assert_eq!(look(&mut Cursor::new(bzimage)).unwrap(), Some(Kernel::Kvm));
        let pvh = elf(b"Xen\0", PVH_ENTRY);
        assert_eq!(look(&mut Cursor::new(pvh)).unwrap(), Some(Kernel::Kvm));
        for other in [elf(b"GNU\0", PVH_ENTRY), elf(b"Xen\0", 5)] {
            assert_eq!(look(&mut Cursor::new(other)).unwrap(), Some(Kernel::Uml));
        }
        assert_eq!(look(&mut Cursor::new(vec![b'x'; 0x300])).unwrap(), None);
        let missing = kind_of(Path::new("/no/such/kernel"));
        let Kernel::No(why) = missing else { panic!() };
        assert!(why.contains("/no/such/kernel"), "{why}");
    }

    proptest! {
        #[test]
        fn no_file_makes_the_look_fail_otherwise_than_by_its_end(
            mut file in prop::collection::vec(any::<u8>(), 0x206..0x400),
        ) {
            file[..6].copy_from_slice(b"\x7fELF\x02\x01");
            if let Err(error) = look(&mut Cursor::new(file)) {
                prop_assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            }
        }
    }
}
