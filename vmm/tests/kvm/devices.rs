//! Devices, driven from the guest's side.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use drupe_vmm::devices::Device;
use drupe_vmm::devices::blk::Blk;
use drupe_vmm::devices::rng::Rng;
use drupe_vmm::event_loop::{DeviceRef, EventLoop};
use drupe_vmm::machine::kvm::{Builder, End};
use drupe_vmm::transport::mmio::{Line, MmioTransport};

use crate::common::{PATIENCE, device, elf, hardware, start};
use crate::script::{DATA, Script};

/// The first device's window and pin.
const WINDOW: u32 = 0xd000_0000;
const GSI: u32 = 5;

const STATUS: u32 = WINDOW + 0x70;
const NOTIFY: u32 = WINDOW + 0x50;
const INTERRUPT_STATUS: u32 = WINDOW + 0x60;
const INTERRUPT_ACK: u32 = WINDOW + 0x64;

/// Rings of one queue and room for buffers.
const DESC: u32 = DATA;
const AVAIL: u32 = DATA + 0x1000;
const USED: u32 = DATA + 0x2000;
const BUFFER: u32 = DATA + 0x3000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Machine<D> {
    builder: Builder,
    device: DeviceRef<D>,
    failed: Receiver<String>,
}

/// Puts a device into a machine, in the next window.
fn add<D: Device>(
    builder: &mut Builder,
    event_loop: &mut EventLoop,
    label: &str,
    device: D,
) -> DeviceRef<D> {
    let line = Arc::new(Line::new().unwrap());
    let transport = Box::new(MmioTransport::new(line.clone()));
    let device = event_loop.add(label, device, transport).unwrap();
    builder.add(device.slot(), line).unwrap();
    device
}

/// A machine with one device.
fn with<D: Device>(device: D) -> Option<Machine<D>> {
    let mut builder = Builder::new(hardware(crate::common::device()?)).unwrap();
    let mut event_loop = EventLoop::new("test").unwrap();
    let device = add(&mut builder, &mut event_loop, "device", device);
    let (sender, failed) = channel();
    event_loop
        .spawn(
            || Ok(()),
            move |reason| {
                let _ = sender.send(reason);
            },
        )
        .unwrap();
    Some(Machine {
        builder,
        device,
        failed,
    })
}

impl<D> Machine<D> {
    fn run(self, script: &Script) -> (End, String) {
        start(self.builder, &elf(&script.image())).unwrap().end()
    }
}

fn rng() -> Rng {
    Rng::new(Path::new("/dev/urandom")).unwrap()
}

/// The driver's choice of features, and that it is done.
fn choose_features(script: Script, low: u32, high: u32) -> Script {
    script
        .write(WINDOW + 0x24, 0)
        .write(WINDOW + 0x20, low)
        .write(WINDOW + 0x24, 1)
        .write(WINDOW + 0x20, high)
        .write(STATUS, 11)
}

/// A driver's way to a device that is ready: features, queue 0 of 8
/// descriptors at `desc`.
fn set_up(script: Script, desc: u32) -> Script {
    let script = script
        .listen(GSI)
        .expect(WINDOW, u32::from_le_bytes(*b"virt"))
        .expect(WINDOW + 4, 2)
        .write(STATUS, 0)
        .write(STATUS, 1)
        .write(STATUS, 3);
    // VERSION_1 alone.
    choose_features(script, 0, 1)
        .expect(STATUS, 11)
        .write(WINDOW + 0x30, 0)
        .expect(WINDOW + 0x44, 0)
        .expect(WINDOW + 0x34, 256)
        .write(WINDOW + 0x38, 8)
        .write(WINDOW + 0x80, desc)
        .write(WINDOW + 0x84, 0)
        .write(WINDOW + 0x90, AVAIL)
        .write(WINDOW + 0x94, 0)
        .write(WINDOW + 0xa0, USED)
        .write(WINDOW + 0xa4, 0)
        .write(WINDOW + 0x44, 1)
        .expect(WINDOW + 0x44, 1)
        .write(STATUS, 15)
        .expect(STATUS, 15)
}

/// Memory with descriptors from 0 on, each the head of a chain unless the one
/// before it goes on, and those heads available.
fn chains(script: Script, descriptors: &[(u32, u32, u16)]) -> Script {
    let mut table = Vec::new();
    let mut heads = Vec::new();
    let mut goes_on = false;
    for (index, &(address, len, flags)) in (0u16..).zip(descriptors) {
        table.extend(u64::from(address).to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(flags.to_le_bytes());
        table.extend((index + 1).to_le_bytes());
        if !goes_on {
            heads.extend(index.to_le_bytes());
        }
        goes_on = flags & NEXT != 0;
    }
    let count = (heads.len() / 2) as u16;
    let mut avail = vec![0, 0];
    avail.extend(count.to_le_bytes());
    avail.extend(heads);
    script.memory(DESC, &table).memory(AVAIL, &avail)
}

/// Kicks, and takes the interrupt for the `nth` time.
fn kick_and_wait(script: Script, nth: u32) -> Script {
    script
        .write(NOTIFY, 0)
        .wait(nth)
        .expect(INTERRUPT_STATUS, 1)
        .write(INTERRUPT_ACK, 1)
        .expect(INTERRUPT_STATUS, 0)
}

#[test]
fn a_queue_is_kicked_and_interrupts_the_guest() {
    let Some(machine) = with(rng()) else { return };
    let script = chains(Script::new(), &[(BUFFER, 64, WRITE)]);
    let script = kick_and_wait(set_up(script, DESC), 1)
        // One used element: head 0, 64 bytes.
        .expect(USED, 1 << 16)
        .expect(USED + 4, 0)
        .expect(USED + 8, 64)
        .print("ok");
    assert_eq!(machine.run(&script), (End::PowerOff, "ok".to_owned()));
}

#[test]
fn a_disk_is_read_and_changes_under_the_guest() {
    let Some(machine) = with(Blk::empty("image0").unwrap()) else {
        return;
    };
    let status = BUFFER + 0x800;
    let mut header = [0; 16];
    let script = chains(
        Script::new(),
        &[
            (BUFFER, 16, NEXT),
            (BUFFER + 0x100, 512, NEXT | WRITE),
            (status, 1, WRITE),
        ],
    );
    // Sector 1.
    header[8] = 1;
    // Nothing is available yet.
    let script = script
        .memory(BUFFER, &header)
        .memory(status, &[0xff])
        .memory(AVAIL + 2, &[0, 0]);
    let script = set_up(script, DESC)
        // No capacity yet; the test attaches a disk once it has seen this.
        .expect(WINDOW + 0x100, 0)
        .print("empty;")
        .wait(1)
        .expect(INTERRUPT_STATUS, 2)
        .write(INTERRUPT_ACK, 2)
        .expect(WINDOW + 0xfc, 1)
        .expect(WINDOW + 0x100, 16)
        .write_half(AVAIL + 2, 1);
    let script = kick_and_wait(script, 2)
        .expect_masked(status, 0, 0xff)
        .expect(USED + 8, 513)
        .expect(BUFFER + 0x100, 0x5a5a_5a5a)
        .print("ok");

    let disk = machine.device.clone();
    let mut running = start(machine.builder, &elf(&script.image())).unwrap();
    let mut seen = [0; 6];
    std::io::Read::read_exact(&mut running.console, &mut seen).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0; 512]).unwrap();
    file.write_all(&[0x5a; 8192 - 512]).unwrap();
    disk.post(move |disk, io| disk.attach(vec![file], io).unwrap())
        .unwrap();
    assert_eq!(running.end(), (End::PowerOff, "ok".to_owned()));
}

#[test]
fn a_buffer_outside_of_memory_is_not_touched() {
    let Some(machine) = with(rng()) else { return };
    let script = chains(
        Script::new(),
        &[
            (32 << 20, 64, WRITE),
            ((32 << 20) - 32, 64, WRITE),
            (0xd000_0000, 64, WRITE),
            (BUFFER, 64, WRITE),
        ],
    );
    let script = set_up(script, DESC).expect((32 << 20) - 32, 0);
    let script = kick_and_wait(script, 1)
        .poll(USED, 4 << 16, u32::MAX)
        .expect(USED + 8, 0)
        .expect(USED + 16, 0)
        .expect(USED + 24, 0)
        .expect(USED + 32, 64)
        .expect((32 << 20) - 32, 0)
        .print("ok");
    assert_eq!(machine.run(&script), (End::PowerOff, "ok".to_owned()));
}

#[test]
fn a_ring_outside_of_memory_ends_the_machine() {
    let Some(machine) = with(rng()) else { return };
    let script = set_up(Script::new(), (32 << 20) - 64).print("went on");
    let (end, text) = machine.run(&script);
    let reason = "device device: queue 0 lies outside of memory".to_owned();
    assert_eq!((end, text), (End::Failed(reason), String::new()));
}

#[test]
fn a_queue_that_runs_wild_ends_its_loop_and_nothing_else() {
    let Some(machine) = with(rng()) else { return };
    // The index is further ahead than the ring is long.
    let script = Script::new().memory(AVAIL, &[0, 0, 0xff, 0x7f]);
    let script = set_up(script, DESC).write(NOTIFY, 0).print("on").spin();
    let failed = machine.failed;
    let mut running = start(machine.builder, &elf(&script.image())).unwrap();
    let reason = failed.recv_timeout(PATIENCE).unwrap();
    assert!(reason.starts_with("device device: "), "{reason}");
    running.machine.kill();
}

#[test]
fn a_reset_device_starts_over() {
    let Some(machine) = with(rng()) else { return };
    let script = chains(Script::new(), &[(BUFFER, 64, WRITE)]);
    let script = kick_and_wait(set_up(script, DESC), 1)
        .write(STATUS, 0)
        .expect(STATUS, 0)
        .expect(WINDOW + 0x44, 0)
        // A kick of a device that was reset is none.
        .write(NOTIFY, 0)
        .write(USED, 0);
    let script = set_up(script, DESC).poll(USED, 1 << 16, u32::MAX);
    // Nor does it matter to the guest itself that nothing drives it.
    let script = script.wait(2).write(STATUS, 0).print("ok");
    assert_eq!(machine.run(&script), (End::PowerOff, "ok".to_owned()));
}

#[test]
fn a_driver_cannot_take_what_is_not_offered() {
    let Some(machine) = with(rng()) else { return };
    // Not without VERSION_1, and not with a bit of another device.
    let script = Script::new()
        .write(STATUS, 3)
        .write(STATUS, 11)
        .expect(STATUS, 3);
    let script = choose_features(script, 1, 1).expect(STATUS, 3);
    let script = choose_features(script, 0, 1)
        .expect(STATUS, 11)
        // A queue that is none; half a register; a register that is none.
        .write(WINDOW + 0x30, 7)
        .expect(WINDOW + 0x34, 0)
        .write(WINDOW + 0x44, 1)
        .expect(WINDOW + 0x44, 0)
        .write_half(STATUS, 0)
        .expect(STATUS, 11)
        .write(WINDOW + 0xf0, 1)
        .expect(WINDOW + 0xf0, 0)
        .expect(WINDOW + 0xb0, u32::MAX)
        .write(WINDOW + 0xffc, 1)
        .expect(WINDOW + 0xffc, 0)
        .print("ok");
    assert_eq!(machine.run(&script), (End::PowerOff, "ok".to_owned()));
}

#[test]
fn many_devices_have_a_window_each() {
    let Some(kvm) = device() else { return };
    let mut builder = Builder::new(hardware(kvm)).unwrap();
    let mut event_loop = EventLoop::new("test").unwrap();
    let mut script = Script::new();
    for index in 0..24u32 {
        let label = format!("image{index}");
        let disk = Blk::empty(&label).unwrap();
        add(&mut builder, &mut event_loop, &label, disk);
        script = script.expect(WINDOW + index * 0x1000 + 8, 2);
    }
    event_loop
        .spawn(|| Ok(()), |reason| panic!("{reason}"))
        .unwrap();
    let script = script.expect(WINDOW + 24 * 0x1000, u32::MAX).print("ok");
    let result = start(builder, &elf(&script.image())).unwrap().end();
    assert_eq!(result, (End::PowerOff, "ok".to_owned()));
}
