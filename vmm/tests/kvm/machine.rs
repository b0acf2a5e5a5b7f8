//! The machine without devices.

use std::sync::mpsc::RecvTimeoutError;

use drupe_vmm::machine::kvm::{Builder, End};

use crate::common::{PATIENCE, bzimage, device, elf, hardware, skipped, start};
use crate::guest;
use crate::script::{DATA, Script};

guest!(
    says_hello,
    "mov $0x3f8, %dx",
    "mov $'h', %al",
    "out %al, %dx",
    "mov $'i', %al",
    "out %al, %dx",
    "mov $0xfe, %al",
    "out %al, $0x64",
    "hlt",
);

/// Runs a list on a machine without devices.
fn run(script: &Script) -> Option<(End, String)> {
    let builder = Builder::new(hardware(device()?)).unwrap();
    Some(start(builder, &elf(&script.image())).unwrap().end())
}

#[test]
fn a_guest_prints_and_powers_off() {
    let Some(kvm) = device() else { return };
    let builder = Builder::new(hardware(kvm)).unwrap();
    let (end, text) = start(builder, &elf(says_hello())).unwrap().end();
    assert_eq!((end, text.as_str()), (End::PowerOff, "hi"));
}

#[test]
fn ports_answer_as_a_pc_without_firmware() {
    let script = Script::new()
        // The keyboard controller is idle, nothing answers at port 0x80, the
        // serial port is ready to send.
        .expect_port(0x64, 0)
        .expect_port(0x80, 0xff)
        .expect_port(0x3fd, 0x60)
        .print("ok");
    let Some(result) = run(&script) else { return };
    assert_eq!(result, (End::PowerOff, "ok".to_owned()));
}

#[test]
fn beyond_its_memory_a_guest_finds_nothing() {
    let script = Script::new()
        // Its memory: the last word of 32 MiB, and what is written to it.
        .expect((32 << 20) - 4, 0)
        .write((32 << 20) - 4, 7)
        .expect((32 << 20) - 4, 7)
        // The first word after it, the end of the hole, the devices' place.
        .write(32 << 20, 7)
        .expect(32 << 20, u32::MAX)
        .expect(0xbfff_fffc, u32::MAX)
        .write(0xd000_0000, 7)
        .expect(0xd000_0000, u32::MAX)
        .expect(0xffff_fff0, u32::MAX)
        .print("ok");
    let Some(result) = run(&script) else { return };
    assert_eq!(result, (End::PowerOff, "ok".to_owned()));
}

guest!(has_no_handler, "ud2");

#[test]
fn a_triple_fault_ends_the_machine() {
    let Some(kvm) = device() else { return };
    let builder = Builder::new(hardware(kvm)).unwrap();
    let (end, _) = start(builder, &elf(has_no_handler())).unwrap().end();
    let End::Failed(how) = end else {
        panic!("{end:?}");
    };
    assert!(how.contains("triple fault"), "{how}");
}

#[test]
fn a_guest_that_never_ends_is_killed() {
    let Some(kvm) = device() else { return };
    let script = Script::new().spin();
    let builder = Builder::new(hardware(kvm)).unwrap();
    let mut running = start(builder, &elf(&script.image())).unwrap();
    assert_eq!(
        running
            .ended
            .recv_timeout(std::time::Duration::from_millis(50)),
        Err(RecvTimeoutError::Timeout)
    );
    running.machine.kill();
    // The threads go, and nobody is told of an end.
    assert_eq!(
        running.ended.recv_timeout(PATIENCE),
        Err(RecvTimeoutError::Disconnected)
    );
}

#[test]
fn a_guest_that_halts_for_good_is_killed() {
    let Some(kvm) = device() else { return };
    let script = Script::new().wait(1);
    let builder = Builder::new(hardware(kvm)).unwrap();
    let mut running = start(builder, &elf(&script.image())).unwrap();
    running.machine.kill();
    assert_eq!(
        running.ended.recv_timeout(PATIENCE),
        Err(RecvTimeoutError::Disconnected)
    );
}

#[test]
fn the_second_processor_starts_when_it_is_told() {
    let Some(kvm) = device() else { return };
    let mut hardware = hardware(kvm);
    hardware.vcpus = 2;
    if std::thread::available_parallelism().unwrap().get() < 2 {
        skipped("this host has one CPU: no second processor is started");
        return;
    }
    // movl $0x12345678, 0x7000; hlt; jmp -3: in real mode.
    let words = [0x0006_c766, 0x3456_7870, 0xfdeb_f412];
    let mut script = Script::new();
    for (at, word) in (0x8000..).step_by(4).zip(words) {
        script = script.write(at, word);
    }
    let script = script
        .expect(0x7000, 0)
        .start_second(0x8000)
        .poll(0x7000, 0x1234_5678, u32::MAX)
        .print("ok");
    let builder = Builder::new(hardware).unwrap();
    let result = start(builder, &elf(&script.image())).unwrap().end();
    assert_eq!(result, (End::PowerOff, "ok".to_owned()));
}

#[test]
fn a_console_that_nobody_reads_holds_nobody_up() {
    let Some(kvm) = device() else { return };
    let builder = Builder::new(hardware(kvm)).unwrap();
    let mut running = start(builder, &elf(print_for_ever())).unwrap();
    assert_eq!(running.ended.recv_timeout(PATIENCE), Ok(End::PowerOff));
    running.machine.kill();
}

guest!(
    print_for_ever,
    "mov $0x3f8, %dx",
    "mov $'x', %al",
    "mov $100000, %ecx",
    "4:",
    "out %al, %dx",
    "dec %ecx",
    "jnz 4b",
    "mov $0xfe, %al",
    "out %al, $0x64",
    "hlt",
);

#[test]
fn the_kernel_is_told_what_there_is() {
    // PVH start info at 0x6000 (magic, version 1, one module, three lines of
    // memory map), the MP table's magic, the command line.
    let script = Script::new()
        .expect(0x6000, 0x336e_c578)
        .expect(0x6004, 1)
        .expect(0x600c, 1)
        .expect(0x6028 + 8, 3)
        .expect(0x9_fc00, u32::from_le_bytes(*b"_MP_"))
        .expect(0x2_0000, u32::from_le_bytes(*b"cons"))
        // The initramfs is as it was: its first word, at the top of memory.
        .expect((32 << 20) - 4096, u32::from_le_bytes(*b"init"))
        .expect_masked(DATA, 0, u32::MAX)
        .print("ok");
    let Some(result) = run(&script) else { return };
    assert_eq!(result, (End::PowerOff, "ok".to_owned()));
}

guest!(
    in_long_mode,
    ".code64",
    // The zero page has the image's header, with our command line.
    "mov $'-', %bl",
    "cmpl $0x53726448, 0x202(%rsi)",
    "jne 5f",
    "cmpl $0x20000, 0x228(%rsi)",
    "jne 5f",
    // Three lines of memory map; the first GiB is mapped.
    "cmpb $3, 0x1e8(%rsi)",
    "jne 5f",
    "mov $0x1ffffff, %rax",
    "movb $'6', (%rax)",
    "mov (%rax), %bl",
    "5:",
    "mov $0x3f8, %dx",
    "mov %bl, %al",
    "out %al, %dx",
    "mov $0xfe, %al",
    "out %al, $0x64",
    "hlt",
);

#[test]
fn a_bzimage_is_entered_in_long_mode() {
    let Some(kvm) = device() else { return };
    let builder = Builder::new(hardware(kvm)).unwrap();
    let result = start(builder, &bzimage(in_long_mode())).unwrap().end();
    assert_eq!(result, (End::PowerOff, "6".to_owned()));
}
