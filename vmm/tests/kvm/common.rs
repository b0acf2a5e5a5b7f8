//! A machine with a guest out of this test's own text.

use std::fs::File;
use std::io::{PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use drupe_vmm::machine::Machine;
use drupe_vmm::machine::kvm::{Builder, End, Guest, Hardware, StartError};
use vmm_client::HugePages;

/// No guest here takes a hundredth of it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Where guests are loaded.
pub const BASE: u32 = 0x1_0000;

/// The machine code between two labels of this program.
///
/// `guest!(NAME, "instruction", ...)` makes `NAME()` its bytes. They are in AT&T
/// syntax, run in 32-bit protected mode without paging, loaded at 0x10000,
/// and begin with the label `NAME`; `$(label - NAME + 0x10000)` is an address.
#[macro_export]
macro_rules! guest {
    ($name:ident, $($line:literal),+ $(,)?) => {
        core::arch::global_asm!(
            ".pushsection .rodata",
            concat!(".globl ", stringify!($name)),
            concat!(stringify!($name), ":"),
            ".code32",
            $($line,)+
            ".code64",
            concat!(".globl ", stringify!($name), "_end"),
            concat!(stringify!($name), "_end:"),
            ".popsection",
            options(att_syntax)
        );
        fn $name() -> &'static [u8] {
            // SAFETY: the assembler's text above defines both labels, and
            // nothing but their addresses is used.
            unsafe extern "C" {
                #[link_name = stringify!($name)]
                static START: u8;
                #[link_name = concat!(stringify!($name), "_end")]
                static END: u8;
            }
            $crate::common::between(&raw const START, &raw const END)
        }
    };
}

/// The bytes from one label to another.
pub fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: both labels are in one section of this program's text.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// /dev/kvm; without it the test says so and passes.
pub fn device() -> Option<OwnedFd> {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        skipped(&format!(
            "/dev/kvm does not open ({error}): no guests are run"
        ));
    }
    opened.ok().map(OwnedFd::from)
}

/// Straight to the terminal: the test harness would swallow it.
pub fn skipped(why: &str) {
    File::options()
        .write(true)
        .open("/dev/stderr")
        .and_then(|mut f| f.write_all(format!("SKIPPED: {why}\n").as_bytes()))
        .unwrap();
}

pub fn hardware(kvm: OwnedFd) -> Hardware {
    Hardware {
        kvm,
        vcpus: 1,
        memory_mib: 32,
        huge_pages: HugePages::Off,
    }
}

/// An ELF image with `code` at [`BASE`], entered at its first byte by PVH.
pub fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE_LEN: u64 = 12 + 4 + 4;
    let mut image = Vec::new();
    image.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // ET_EXEC, x86-64, version 1.
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [u64::from(BASE), 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, offset: u64, address: u64, len: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for word in [offset, address, address, len, len, 4] {
            image.extend(word.to_le_bytes());
        }
    };
    segment(4, HEADERS, 0, NOTE_LEN);
    segment(1, HEADERS + NOTE_LEN, BASE.into(), code.len() as u64);
    // XEN_ELFNOTE_PHYS32_ENTRY.
    for word in [4u32, 4, 18] {
        image.extend(word.to_le_bytes());
    }
    image.extend(b"Xen\0");
    image.extend(BASE.to_le_bytes());
    image.extend(code);
    image
}

/// A bzImage whose 64-bit entry is `code`.
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    // One setup sector; version 2.15, loaded high at 1 MiB, unpacked at 2 MiB.
    image[0x1f1] = 1;
    for (at, bytes) in [
        (0x202, &b"HdrS"[..]),
        (0x206, &0x20fu16.to_le_bytes()),
        (0x211, &[1]),
        (0x214, &0x10_0000u32.to_le_bytes()),
        (0x22c, &0x7fff_ffffu32.to_le_bytes()),
        (0x236, &[1, 0]),
        (0x258, &0x20_0000u64.to_le_bytes()),
        (0x260, &0x10_0000u32.to_le_bytes()),
    ] {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    image.resize(1024 + 0x200, 0);
    image.extend(code);
    image
}

pub fn file(bytes: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    let mut again = file.try_clone().unwrap();
    std::io::Seek::rewind(&mut again).unwrap();
    again.into()
}

pub struct Running {
    pub machine: Box<dyn Machine>,
    pub console: PipeReader,
    pub ended: Receiver<End>,
}

impl Running {
    /// Waits for the guest's end; how, and what it printed.
    pub fn end(self) -> (End, String) {
        let end = self.ended.recv_timeout(PATIENCE).expect("the guest ends");
        let Self {
            mut machine,
            mut console,
            ..
        } = self;
        machine.kill();
        let mut text = Vec::new();
        console.read_to_end(&mut text).unwrap();
        (end, String::from_utf8_lossy(&text).into_owned())
    }
}

pub fn start(builder: Builder, kernel: &[u8]) -> Result<Running, StartError> {
    start_with(builder, kernel, file(b"initramfs"), &[])
}

pub fn start_with(
    builder: Builder,
    kernel: &[u8],
    initramfs: OwnedFd,
    args: &[String],
) -> Result<Running, StartError> {
    let (sender, ended) = channel();
    let guest = Guest {
        kernel: file(kernel),
        initramfs,
        args: args.to_vec(),
    };
    let started = builder.start(guest, drupe_vmm::filter::confine, move |end| {
        // One that comes after the first has nobody to listen.
        let _ = sender.send(end);
    })?;
    Ok(Running {
        machine: started.machine,
        console: started.console,
        ended,
    })
}
