//! A driver of virtio-mmio as a script wants it: the processors of a guest may
//! write anything to a device's window, and rings are where it says.

use std::io;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Script;
use super::guest::descriptor;
use super::memory::{Guarded, REGIONS};
use super::targets::{Ended, memory_file};
use crate::devices::Poller;
use crate::devices::blk::Blk;
use crate::transport::mmio::{Line, Mmio, MmioTransport, NOTIFY, reg};
use crate::transport::{SharedSlot, Slot};

/// Accesses of one script.
const ACCESSES: usize = 512;
/// Rounds of events at once.
const ROUNDS: usize = 8;

const DEVICE: u32 = 0;
const KICK: u32 = 1;

/// Where a driver that follows the rules puts its rings and its requests.
const RINGS: u64 = 0x1000;
const DATA: u64 = 0x4_0000;

/// # Panics
///
/// When the device wrote outside of the guest's memory.
pub fn mmio(mut script: Script<'_>) -> io::Result<Ended> {
    let guarded = Guarded::new()?;
    let mem = guarded.regions().ok_or(io::ErrorKind::InvalidInput)?;
    let driver = Driver::new(mem)?;
    let ended = driver.act(&mut script).err().map(|e| e.to_string());
    // Threads of the device end with it.
    drop(driver);
    assert!(guarded.is_unharmed(), "written outside of guest memory");
    Ok(ended)
}

struct Driver {
    window: Mmio,
    slot: SharedSlot,
    epoll: Arc<Epoll>,
    mem: GuestMemoryMmap,
}

impl Driver {
    fn new(mem: GuestMemoryMmap) -> io::Result<Self> {
        let mut disk = Blk::scratch("scratch", memory_file(1 << 20)?).map_err(io::Error::other)?;
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        let poller = |tag| Poller::new(epoll.clone(), tag);
        crate::devices::Device::start(&mut disk, poller(DEVICE))?;
        let line = Arc::new(Line::new()?);
        let transport = MmioTransport::new(line.clone());
        let slot = Slot::new("disk".into(), Box::new(disk), &transport, poller(KICK))?;
        let slot = SharedSlot::new(slot);
        Ok(Self {
            window: Mmio::new(slot.clone(), line, mem.clone())?,
            slot,
            epoll,
            mem,
        })
    }

    fn act(&self, script: &mut Script<'_>) -> io::Result<()> {
        for _ in 0..ACCESSES {
            if script.is_over() {
                break;
            }
            match script.byte() % 16 {
                0 => self.set_up()?,
                1 | 2 => {
                    let offset = offset(script);
                    let mut data = vec![0; usize::from(script.byte() % 9)];
                    self.window.read(offset, &mut data);
                }
                3 | 4 => self.request(script),
                5 => {
                    let at = u64::from(script.short()) << (script.byte() % 8);
                    let most = usize::from(script.byte());
                    // What lies outside of memory a guest cannot write either.
                    let _ = self.mem.write(script.bytes(most), GuestAddress(at));
                }
                6 => {
                    let offset = offset(script);
                    let most = usize::from(script.byte() % 9);
                    self.window.write(offset, script.bytes(most))?;
                }
                7 | 8 => self.kick(script)?,
                _ => {
                    let value = value(script);
                    self.window.write(offset(script), &value.to_le_bytes())?;
                }
            }
            self.events()?;
        }
        Ok(())
    }

    /// As a driver does that follows the rules.
    fn set_up(&self) -> io::Result<()> {
        for (register, value) in [
            (reg::STATUS, 0),
            (reg::STATUS, 1),
            (reg::STATUS, 3),
            (reg::DRIVER_FEATURES_SEL, 0),
            (reg::DRIVER_FEATURES, 1 << 28),
            (reg::DRIVER_FEATURES_SEL, 1),
            (reg::DRIVER_FEATURES, 1),
            (reg::STATUS, 11),
            (reg::QUEUE_SEL, 0),
            (reg::QUEUE_NUM, 16),
            (reg::QUEUE_DESC_LOW, RINGS as u32),
            (reg::QUEUE_DESC_HIGH, 0),
            (reg::QUEUE_DRIVER_LOW, RINGS as u32 + 0x1000),
            (reg::QUEUE_DRIVER_HIGH, 0),
            (reg::QUEUE_DEVICE_LOW, RINGS as u32 + 0x2000),
            (reg::QUEUE_DEVICE_HIGH, 0),
            (reg::QUEUE_READY, 1),
        ] {
            self.window.write(register, &u32::to_le_bytes(value))?;
        }
        let _ = self.mem.write(&[0; 0x3000], GuestAddress(RINGS));
        self.window.write(reg::STATUS, &15_u32.to_le_bytes())
    }

    /// A read of the disk, in a chain that the next kick shows.
    fn request(&self, script: &mut Script<'_>) {
        let head = u16::from(script.byte() % 14);
        let sector = script.byte();
        let mut header = [0; 16];
        header[0] = script.byte() % 16;
        header[8] = sector;
        let _ = self.mem.write(&header, GuestAddress(DATA));
        let len = script.len();
        for (n, what) in (0u64..).zip([
            (DATA, 16, 1, head + 1),
            (DATA + 0x1000, len, 3, head + 2),
            (DATA + 0x800, 1, 2, 0),
        ]) {
            let at = RINGS + 16 * (u64::from(head) + n);
            let _ = self.mem.write(&descriptor(what), GuestAddress(at));
        }
        let next: u16 = self
            .mem
            .read_obj(GuestAddress(RINGS + 0x1002))
            .unwrap_or_default();
        let slot = RINGS + 0x1004 + 2 * u64::from(next % 16);
        let _ = self.mem.write(&head.to_le_bytes(), GuestAddress(slot));
        let next = next.wrapping_add(1).to_le_bytes();
        let _ = self.mem.write(&next, GuestAddress(RINGS + 0x1002));
    }

    /// What an ioeventfd does, or a write that none takes.
    fn kick(&self, script: &mut Script<'_>) -> io::Result<()> {
        let queue = usize::from(script.byte() % 4);
        match self.window.kicks().get(queue) {
            Some(kick) => kick.write(1),
            None => self.window.write(NOTIFY, &(queue as u32).to_le_bytes()),
        }
    }

    /// As the device's event loop does.
    fn events(&self) -> io::Result<()> {
        for _ in 0..ROUNDS {
            let mut events = [EpollEvent::empty(); 8];
            let ready = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
            for event in &events[..ready] {
                let (tag, token) = ((event.data() >> 32) as u32, event.data() as u32);
                let mut slot = self.slot.lock();
                match tag {
                    KICK => slot.kick_ready(token)?,
                    _ => slot.with(|device, io| device.host_ready(token, event.events(), io))?,
                }
            }
            if ready == 0 {
                break;
            }
        }
        Ok(())
    }
}

fn offset(script: &mut Script<'_>) -> u64 {
    match script.byte() % 8 {
        0 => script.long(),
        1 => u64::from(script.short()),
        2 => reg::CONFIG + u64::from(script.byte()),
        3 => reg::STATUS,
        4 => reg::QUEUE_READY,
        _ => u64::from(script.byte()) & !3,
    }
}

fn value(script: &mut Script<'_>) -> u32 {
    match script.byte() % 8 {
        0 => script.long() as u32,
        1 => REGIONS[0].1 as u32 - u32::from(script.byte()),
        2 => RINGS as u32 + (u32::from(script.byte()) << 4),
        3 => u32::MAX,
        4 => 1 << (script.byte() % 32),
        _ => u32::from(script.byte()),
    }
}
