//! A driver's accesses, sound ones and others. The same from a guest's side is
//! in `tests/kvm`.

use std::path::Path;

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::GuestAddress;

use super::*;
use crate::devices::blk::Blk;
use crate::devices::rng::Rng;
use crate::devices::{Device, Interrupt};
use crate::event_loop::EventLoop;

const MEMORY: usize = 1 << 20;

struct Driver {
    mmio: Mmio,
    line: Arc<Line>,
    /// Not running: nothing but the driver touches the slot.
    _event_loop: EventLoop,
}

impl Driver {
    fn of(device: impl Device) -> Self {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let line = Arc::new(Line::new().unwrap());
        let mut event_loop = EventLoop::new("test").unwrap();
        let transport = Box::new(MmioTransport::new(line.clone()));
        let device = event_loop.add("device", device, transport).unwrap();
        Self {
            mmio: Mmio::new(device.slot(), line.clone(), mem).unwrap(),
            line,
            _event_loop: event_loop,
        }
    }

    fn rng() -> Self {
        Self::of(Rng::new(Path::new("/dev/urandom")).unwrap())
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.try_write(offset, value).unwrap();
    }

    fn try_write(&self, offset: u64, value: u32) -> io::Result<()> {
        self.mmio.write(offset, &value.to_le_bytes())
    }

    fn negotiate(&self) {
        self.write(reg::STATUS, 3);
        self.write(reg::DRIVER_FEATURES_SEL, VIRTIO_F_VERSION_1 / 32);
        self.write(reg::DRIVER_FEATURES, 1);
        self.write(reg::STATUS, 11);
        assert_eq!(self.read(reg::STATUS), 11);
    }

    fn set_queue(&self, size: u32, desc: u32) {
        self.write(reg::QUEUE_SEL, 0);
        self.write(reg::QUEUE_NUM, size);
        self.write(reg::QUEUE_DESC_LOW, desc);
        self.write(reg::QUEUE_DRIVER_LOW, 0x1000);
        self.write(reg::QUEUE_DEVICE_LOW, 0x2000);
        self.write(reg::QUEUE_READY, 1);
    }
}

#[test]
fn a_device_says_what_it_is() {
    let driver = Driver::rng();
    assert_eq!(driver.read(reg::MAGIC), u32::from_le_bytes(*b"virt"));
    assert_eq!(driver.read(reg::VERSION), 2);
    assert_eq!(driver.read(reg::DEVICE_ID), 4);
    driver.write(reg::DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.read(reg::DEVICE_FEATURES) & 1, 1, "VERSION_1");
    driver.write(reg::DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(reg::DEVICE_FEATURES), 0);
}

#[test]
fn the_device_gets_its_queue_when_the_driver_is_ready() {
    let driver = Driver::rng();
    driver.negotiate();
    driver.set_queue(8, 0x4000);
    let ready = || driver.mmio.slot.lock().queue(0).unwrap().ready();
    assert!(!ready(), "before DRIVER_OK nothing is the device's");
    assert_eq!(
        driver.mmio.kicks()[0].read().unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    driver.write(reg::STATUS, 15);
    assert!(ready());
    assert_eq!(driver.mmio.slot.lock().queue(0).unwrap().size(), 8);
    // It is asked to look: the driver may have kicked already.
    assert_eq!(driver.mmio.kicks()[0].read().unwrap(), 1);

    // In use, a queue cannot be moved.
    driver.set_queue(16, 0x8000);
    assert_eq!(driver.mmio.registers().queues[0].desc, 0x4000);

    driver.write(reg::STATUS, 0);
    assert!(!ready());
    assert_eq!(driver.read(reg::QUEUE_READY), 0);
}

#[test]
fn a_queue_can_go_and_come_while_the_device_lives() {
    let driver = Driver::rng();
    driver.negotiate();
    driver.write(reg::STATUS, 15);
    driver.set_queue(8, 0x4000);
    let ready = || driver.mmio.slot.lock().queue(0).unwrap().ready();
    assert!(ready());
    driver.write(reg::QUEUE_READY, 0);
    assert!(!ready());
    driver.set_queue(8, 0x4000);
    assert!(ready());
}

#[test]
fn queues_that_cannot_be_are_named() {
    for (size, desc, reason) in [
        (512, 0x4000, "device device: queue 0 of 512 descriptors"),
        (100, 0x4000, "device device: queue 0 of 100 descriptors"),
        (0, 0x4000, "device device: queue 0 of 0 descriptors"),
        (
            8,
            MEMORY as u32,
            "device device: queue 0 lies outside of memory",
        ),
    ] {
        let driver = Driver::rng();
        driver.negotiate();
        driver.set_queue(size, desc);
        let error = driver.try_write(reg::STATUS, 15).unwrap_err();
        assert_eq!(error.to_string(), reason);
    }
}

#[test]
fn interrupts_are_told_and_acknowledged_without_the_slot() {
    let driver = Driver::of(Blk::empty("image0").unwrap());
    let held = driver.mmio.slot.clone();
    let held = held.lock();
    driver.line.config_changed();
    driver.line.queue_used(0);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 3);
    assert_eq!(driver.read(reg::CONFIG_GENERATION), 1);
    driver.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 2);
    drop(held);

    // What came before the driver listened is told again.
    assert_eq!(driver.line.irqfd().read().unwrap(), 2);
    driver.negotiate();
    driver.write(reg::STATUS, 15);
    assert_eq!(driver.line.irqfd().read().unwrap(), 1);
    driver.write(reg::STATUS, 0);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn what_a_driver_wrote_is_plain_data() {
    let driver = Driver::rng();
    driver.negotiate();
    driver.set_queue(8, 0x4000);
    let registers = driver.mmio.registers().clone();
    let text = serde_json::to_string(&registers).unwrap();
    assert_eq!(serde_json::from_str::<Registers>(&text).unwrap(), registers);
}

#[derive(Clone, Debug)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![
        4 => (0u64..0x44).prop_map(|n| n * 4),
        1 => 0..WINDOW,
    ];
    let value = prop_oneof![
        (0u32..20).prop_map(|n| n.to_le_bytes().to_vec()),
        any::<u32>().prop_map(|n| n.to_le_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 1..=8),
    ];
    (offset, value, any::<bool>()).prop_map(|(offset, value, write)| match write {
        true => Access::Write(offset, value),
        false => Access::Read(offset, value.len()),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a guest does to the registers: no panic, and a device that is
    /// not live holds no queue.
    #[test]
    fn no_sequence_of_accesses_confuses_the_registers(
        accesses in prop::collection::vec(access(), 1..200)
    ) {
        let driver = Driver::of(Blk::empty("image0").unwrap());
        driver.negotiate();
        for access in accesses {
            match access {
                Access::Read(offset, len) => driver.mmio.read(offset, &mut vec![0; len]),
                Access::Write(offset, data) => {
                    if driver.mmio.write(offset, &data).is_err() {
                        // The machine would have ended.
                        return Ok(());
                    }
                }
            }
            let live = driver.mmio.registers().has(status::DRIVER_OK);
            let ready = driver.mmio.slot.lock().queue(0).unwrap().ready();
            prop_assert!(live || !ready);
        }
    }
}
