//! What cannot become a machine is refused in a sentence that names it.

use drupe_vmm::machine::kvm::{Builder, StartError};
use drupe_vmm::supervisor::chain;
use vmm_client::HugePages;

use crate::common::{device, elf, file, hardware, start_with};
use crate::script::Script;

fn refusal(result: Result<impl Sized, StartError>) -> String {
    chain(&result.err().expect("a refusal"))
}

/// Starts `kernel` with an initramfs of `initramfs` bytes.
fn start(kernel: &[u8], initramfs: usize, args: &[String]) -> Option<String> {
    let builder = Builder::new(hardware(device()?)).unwrap();
    let initramfs = file(&vec![0; initramfs]);
    Some(refusal(start_with(builder, kernel, initramfs, args)))
}

#[test]
fn another_device_than_kvm() {
    let null = file(b"");
    let error = refusal(Builder::new(hardware(null)));
    assert!(
        error.starts_with("the descriptor handed over is no /dev/kvm"),
        "{error}"
    );
}

#[test]
fn more_processors_than_the_host_has() {
    let Some(kvm) = device() else { return };
    let mut hardware = hardware(kvm);
    hardware.vcpus = 4096;
    let error = refusal(Builder::new(hardware));
    assert!(
        error.starts_with("the guest shall have 4096 vCPUs, this host has "),
        "{error}"
    );
}

#[test]
fn huge_pages_that_the_node_has_not_set_aside() {
    let Some(kvm) = device() else { return };
    let mut hardware = hardware(kvm);
    hardware.huge_pages = HugePages::Reserved;
    // More than any node this runs on has set aside.
    hardware.memory_mib = 1 << 20;
    let error = refusal(Builder::new(hardware));
    assert!(
        error.contains("cannot map 1048576 MiB of guest memory in reserved huge pages"),
        "{error}"
    );
}

#[test]
fn a_kernel_that_is_none() {
    for bytes in [&b""[..], b"no kernel", &[0; 4096], b"#!/bin/sh\n"] {
        let Some(error) = start(bytes, 1, &[]) else {
            return;
        };
        assert_eq!(
            error,
            "the guest kernel is neither an ELF image with a PVH entry nor a bzImage"
        );
    }
}

#[test]
fn a_program_that_is_no_kernel() {
    let program = std::fs::read("/proc/self/exe").unwrap();
    let Some(error) = start(&program, 1, &[]) else {
        return;
    };
    // It lies where there is no memory, or has no such entry.
    assert!(error.contains("the guest kernel"), "{error}");
    let mut kernel = elf(&Script::new().image());
    // The note's name is not Xen's.
    let note = kernel.windows(4).position(|w| w == b"Xen\0").unwrap();
    kernel[note] = b'Y';
    let Some(error) = start(&kernel, 1, &[]) else {
        return;
    };
    assert!(
        error.starts_with("the guest kernel has no PVH entry"),
        "{error}"
    );
}

#[test]
fn a_kernel_that_is_cut_short_or_too_large() {
    let kernel = elf(&Script::new().image());
    let Some(error) = start(&kernel[..kernel.len() / 2], 1, &[]) else {
        return;
    };
    assert!(
        error.starts_with("the guest kernel's file is broken"),
        "{error}"
    );

    // Its segment takes 1 GiB once it is loaded.
    let mut large = kernel;
    let memory_size = 64 + 56 + 40;
    large[memory_size..memory_size + 8].copy_from_slice(&(1u64 << 30).to_le_bytes());
    let Some(error) = start(&large, 1, &[]) else {
        return;
    };
    assert_eq!(
        error,
        "the guest kernel needs memory up to 0x40010000, the guest's memory is 32 MiB"
    );
}

#[test]
fn an_initramfs_larger_than_memory() {
    let kernel = elf(&Script::new().image());
    let Some(error) = start(&kernel, 32 << 20, &[]) else {
        return;
    };
    assert_eq!(
        error,
        "the initramfs of 33554432 bytes does not fit into the guest's memory of 32 MiB beside its kernel"
    );
}

#[test]
fn a_command_line_that_is_too_long() {
    let kernel = elf(&Script::new().image());
    let Some(error) = start(&kernel, 1, &["x".repeat(2048)]) else {
        return;
    };
    assert!(error.contains("it takes 2047"), "{error}");
}
