//! virtio-mmio, version 2 (virtio 1.2 §4.2): a device behind a window of 4 KiB
//! in the guest's physical address space.
//!
//! ```text
//! processor's thread ── access ──▶ Mmio ── registers ── slot ◀── event loop
//!                                    └── line ◀── interrupts ───────┘
//! guest ── QueueNotify, by ioeventfd ───────────────────▶ event loop
//! ```
//! A driver sets a device up by accesses that end in [`Mmio::read`] and
//! [`Mmio::write`], on the thread of one of the guest's processors. From then
//! on it only kicks, which goes to the event loop without us, and reads and
//! acknowledges its interrupts, which waits for nobody.

mod line;
mod registers;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use line::Line;
pub use registers::{QueueRegisters, Registers};

use self::registers::{set_high, set_low, status, word};
use super::{SharedSlot, Slot, Transport};
use crate::devices::{Interrupt, Poller};

/// A device's window in the guest's physical address space.
pub const WINDOW: u64 = 0x1000;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "drup": no PCI vendor stands behind the device.
const VENDOR: u32 = 0x7075_7264;

/// Registers (virtio 1.2 §4.2.2).
pub(crate) mod reg {
    pub(crate) const MAGIC: u64 = 0x00;
    pub(crate) const VERSION: u64 = 0x04;
    pub(crate) const DEVICE_ID: u64 = 0x08;
    pub(crate) const VENDOR_ID: u64 = 0x0c;
    pub(crate) const DEVICE_FEATURES: u64 = 0x10;
    pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(crate) const DRIVER_FEATURES: u64 = 0x20;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(crate) const QUEUE_SEL: u64 = 0x30;
    pub(crate) const QUEUE_NUM_MAX: u64 = 0x34;
    pub(crate) const QUEUE_NUM: u64 = 0x38;
    pub(crate) const QUEUE_READY: u64 = 0x44;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
    pub(crate) const INTERRUPT_STATUS: u64 = 0x60;
    pub(crate) const INTERRUPT_ACK: u64 = 0x64;
    pub(crate) const STATUS: u64 = 0x70;
    pub(crate) const QUEUE_DESC_LOW: u64 = 0x80;
    pub(crate) const QUEUE_DESC_HIGH: u64 = 0x84;
    pub(crate) const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub(crate) const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub(crate) const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub(crate) const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub(crate) const SHM_LEN_LOW: u64 = 0xb0;
    pub(crate) const SHM_BASE_HIGH: u64 = 0xbc;
    pub(crate) const CONFIG_GENERATION: u64 = 0xfc;
    pub(crate) const CONFIG: u64 = 0x100;
}

/// QueueNotify: where an ioeventfd listens.
pub const NOTIFY: u64 = reg::QUEUE_NOTIFY;

/// The end that a device's event loop has. Nothing of it needs watching: the
/// guest's processors call.
#[derive(Debug)]
pub struct MmioTransport(Arc<Line>);

impl MmioTransport {
    pub fn new(line: Arc<Line>) -> Self {
        Self(line)
    }
}

impl Transport for MmioTransport {
    fn interrupt(&self) -> Arc<dyn Interrupt> {
        self.0.clone()
    }

    fn start(&mut self, _poller: Poller) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, _token: u32, _slot: &mut Slot) -> io::Result<()> {
        Ok(())
    }
}

/// A device's register file.
///
/// Lock order: `registers`, then `slot`. `line` has no lock, and what only
/// touches it waits for neither.
#[derive(Debug)]
pub struct Mmio {
    device_id: u32,
    registers: Mutex<Registers>,
    slot: SharedSlot,
    line: Arc<Line>,
    kicks: Vec<EventFd>,
    /// The same, for the device's loop.
    kick_files: Vec<Arc<File>>,
    mem: GuestMemoryMmap,
}

impl Mmio {
    /// In front of `slot`, whose transport interrupts through `line`.
    pub fn new(slot: SharedSlot, line: Arc<Line>, mem: GuestMemoryMmap) -> io::Result<Self> {
        let (device_id, sizes) = {
            let slot = slot.lock();
            let device = slot.device();
            (device.id(), device.queue_sizes().to_vec())
        };
        let kick = |_| EventFd::new(EFD_NONBLOCK);
        let kicks: Vec<_> = (0..sizes.len()).map(kick).collect::<io::Result<_>>()?;
        let kick_files = kicks.iter().map(|kick| Ok(Arc::new(file(kick)?)));
        Ok(Self {
            device_id,
            kick_files: kick_files.collect::<io::Result<_>>()?,
            kicks,
            registers: Mutex::new(Registers::new(sizes.into_iter())),
            slot,
            line,
            mem,
        })
    }

    pub fn line(&self) -> &Line {
        &self.line
    }

    /// What a write of a queue's index to [`NOTIFY`] has to signal, by index.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads `data.len()` bytes at `offset` of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= reg::CONFIG {
            let at = (offset - reg::CONFIG) as usize;
            return self.slot.lock().device().read_config(at, data);
        }
        data.fill(0);
        // Registers are read whole (virtio 1.2 §4.2.2.2).
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            reg::INTERRUPT_STATUS => return self.line.status(),
            reg::CONFIG_GENERATION => return self.line.generation(),
            reg::MAGIC => return MAGIC,
            reg::VERSION => return VERSION,
            reg::DEVICE_ID => return self.device_id,
            reg::VENDOR_ID => return VENDOR,
            // No shared memory region has length and address -1.
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => return u32::MAX,
            _ => {}
        }
        let registers = self.registers();
        match offset {
            reg::DEVICE_FEATURES => {
                let offered = self.slot.lock().device().features();
                word(offered, registers.device_features_sel)
            }
            reg::QUEUE_NUM_MAX => registers.queue().map_or(0, |queue| queue.max_size.into()),
            reg::QUEUE_READY => registers.queue().map_or(0, |queue| queue.ready.into()),
            reg::STATUS => registers.status,
            _ => 0,
        }
    }

    /// The guest writes `data` at `offset` of the window. An error means that
    /// its driver broke the protocol beyond repair: the machine ends.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset >= reg::CONFIG {
            let at = (offset - reg::CONFIG) as usize;
            if self.registers().has(status::DRIVER) {
                self.slot.lock().device_mut().write_config(at, data);
            }
            return Ok(());
        }
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return Ok(());
        };
        self.write_register(offset, u32::from_le_bytes(data))
            .map_err(|e| {
                let label = self.slot.lock().label().to_owned();
                io::Error::new(e.kind(), format!("device {label}: {e}"))
            })
    }

    fn write_register(&self, offset: u64, value: u32) -> io::Result<()> {
        match offset {
            reg::INTERRUPT_ACK => {
                self.line.acknowledge(value);
                return Ok(());
            }
            // An ioeventfd takes those of queues that exist.
            reg::QUEUE_NOTIFY => return Ok(()),
            _ => {}
        }
        let mut registers = self.registers();
        match offset {
            reg::DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            reg::DRIVER_FEATURES => registers.set_driver_features(value),
            reg::QUEUE_SEL => registers.queue_sel = value,
            reg::QUEUE_READY => self.set_queue_ready(&mut registers, value)?,
            reg::STATUS => return self.set_status(&mut registers, value),
            _ => {
                if let Some(queue) = registers.queue_in_setup() {
                    match offset {
                        // One that is too large is refused at activation.
                        reg::QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(u16::MAX),
                        reg::QUEUE_DESC_LOW => set_low(&mut queue.desc, value),
                        reg::QUEUE_DESC_HIGH => set_high(&mut queue.desc, value),
                        reg::QUEUE_DRIVER_LOW => set_low(&mut queue.driver, value),
                        reg::QUEUE_DRIVER_HIGH => set_high(&mut queue.driver, value),
                        reg::QUEUE_DEVICE_LOW => set_low(&mut queue.device, value),
                        reg::QUEUE_DEVICE_HIGH => set_high(&mut queue.device, value),
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn set_queue_ready(&self, registers: &mut Registers, value: u32) -> io::Result<()> {
        let index = registers.queue_sel as usize;
        let live = registers.has(status::DRIVER_OK);
        if value != 0 {
            let Some(queue) = registers.queue_in_setup() else {
                return Ok(());
            };
            queue.ready = true;
            if live {
                let queue = queue.clone();
                self.activate(&mut self.slot.lock(), index, &queue)?;
            }
        } else if let Some(queue) = registers.queues.get_mut(index)
            && std::mem::take(&mut queue.ready)
            && live
        {
            let mut slot = self.slot.lock();
            slot.set_kick(index, None)?;
            slot.enable(index, false)?;
        }
        Ok(())
    }

    /// Bits are only added, in the order of virtio 1.2 §3.1.1; 0 resets.
    fn set_status(&self, registers: &mut Registers, value: u32) -> io::Result<()> {
        if value == 0 {
            registers.reset();
            self.slot.lock().reset()?;
            self.line.clear();
            return Ok(());
        }
        let known = status::ACKNOWLEDGE | status::DRIVER | status::FAILED;
        registers.status |= value & known;
        let negotiated = value & status::FEATURES_OK != 0
            && registers.has(status::DRIVER)
            && !registers.has(status::FEATURES_OK);
        if negotiated {
            let mut slot = self.slot.lock();
            if registers.features_are_sound(slot.device().features()) {
                slot.set_features(registers.driver_features);
                registers.status |= status::FEATURES_OK;
            }
        }
        let begins = value & status::DRIVER_OK != 0
            && registers.has(status::FEATURES_OK)
            && !registers.has(status::DRIVER_OK);
        if begins {
            registers.status |= status::DRIVER_OK;
            let mut slot = self.slot.lock();
            slot.set_memory(self.mem.clone());
            for (index, queue) in registers.queues.iter().enumerate() {
                if queue.ready {
                    self.activate(&mut slot, index, queue)?;
                }
            }
            self.line.remind();
        }
        Ok(())
    }

    /// Hands queue `index` to the device, whose loop then looks at it once.
    fn activate(&self, slot: &mut Slot, index: usize, queue: &QueueRegisters) -> io::Result<()> {
        if !queue.size.is_power_of_two() || queue.size > queue.max_size {
            return Err(super::invalid(format!(
                "queue {index} of {} descriptors",
                queue.size
            )));
        }
        let device_queue = slot.queue(index)?;
        device_queue.set_size(queue.size);
        let halves = |address| (Some(word(address, 0)), Some(word(address, 1)));
        let (low, high) = halves(queue.desc);
        device_queue.set_desc_table_address(low, high);
        let (low, high) = halves(queue.driver);
        device_queue.set_avail_ring_address(low, high);
        let (low, high) = halves(queue.device);
        device_queue.set_used_ring_address(low, high);
        slot.enable(index, true)?;
        slot.set_kick(index, Some(self.kick_files[index].clone()))?;
        self.kicks[index].write(1)
    }
}

/// The same eventfd as a file.
fn file(eventfd: &EventFd) -> io::Result<File> {
    // SAFETY: the descriptor is open for as long as `eventfd` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    Ok(File::from(fd.as_fd().try_clone_to_owned()?))
}
