//! What carries a device to its driver.
//!
//! A [`Slot`] is one device with its queues. Its event loop calls the device;
//! whoever speaks with the driver sets the slot up: vhost-user for the `uml`
//! machine, as a [`Transport`] inside the same loop, and virtio-mmio for
//! `kvm`, from the threads of the guest's processors.

pub mod mmio;
pub mod vhost_user;

use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, fs::File};

use nix::sys::epoll::EpollFlags;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::devices::{Device, Interrupt, Io, Poller};

/// Serves one driver's side of a device from inside an event loop.
pub trait Transport: Send {
    /// What the device signals through; asked for once.
    fn interrupt(&self) -> Arc<dyn Interrupt>;

    /// The size of queue for a device that wants at most `wanted`.
    fn queue_size(&self, wanted: u16) -> u16 {
        wanted
    }

    /// Called once, before anything else, with the means to watch the
    /// transport's own descriptors.
    fn start(&mut self, poller: Poller) -> io::Result<()>;

    /// One of the transport's descriptors is ready. An error ends the
    /// machine.
    fn ready(&mut self, token: u32, slot: &mut Slot) -> io::Result<()>;
}

/// A slot as its event loop shares it with those who set it up. The loop holds
/// it for the length of one event, so for as long as the device may block.
///
/// Lock order: the registers of a [`mmio::Mmio`], then the slot; nothing is
/// locked beyond it but what a device owns.
#[derive(Clone, Debug)]
pub struct SharedSlot(Arc<Mutex<Slot>>);

impl SharedSlot {
    pub(crate) fn new(slot: Slot) -> Self {
        Self(Arc::new(Mutex::new(slot)))
    }

    pub fn lock(&self) -> MutexGuard<'_, Slot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device with its queues and what wakes it.
pub struct Slot {
    label: String,
    pub(crate) device: Box<dyn Device>,
    features: u64,
    queues: Vec<Queue>,
    mem: GuestMemoryMmap,
    irq: Arc<dyn Interrupt>,
    kicks: Vec<Option<Arc<File>>>,
    kick_poller: Poller,
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("label", &self.label).finish()
    }
}

impl Slot {
    pub(crate) fn new(
        label: String,
        device: Box<dyn Device>,
        transport: &dyn Transport,
        kick_poller: Poller,
    ) -> io::Result<Self> {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|&size| Queue::new(transport.queue_size(size)).map_err(io::Error::other))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            label,
            device,
            features: 0,
            kicks: queues.iter().map(|_| None).collect(),
            queues,
            mem: GuestMemoryMmap::new(),
            irq: transport.interrupt(),
            kick_poller,
        })
    }

    pub fn label(&self) -> &str {
        &self.label
    }

    pub fn device(&self) -> &dyn Device {
        &*self.device
    }

    pub fn device_mut(&mut self) -> &mut dyn Device {
        &mut *self.device
    }

    /// Takes the driver's choice of features, all of them among those offered.
    pub fn set_features(&mut self, features: u64) {
        self.features = features;
        self.device.set_features(features);
    }

    pub fn set_memory(&mut self, mem: GuestMemoryMmap) {
        self.mem = mem;
    }

    /// The queue `index` while it is being set up.
    pub fn queue(&mut self, index: usize) -> io::Result<&mut Queue> {
        let count = self.queues.len();
        self.queues
            .get_mut(index)
            .ok_or_else(|| invalid(format!("queue {index} of {count}")))
    }

    /// The eventfd by which the driver kicks queue `index`.
    pub fn set_kick(&mut self, index: usize, fd: Option<Arc<File>>) -> io::Result<()> {
        self.queue(index)?;
        if let Some(old) = self.kicks[index].take() {
            self.kick_poller.remove(&old)?;
        }
        if let Some(fd) = fd {
            let token = u32::try_from(index).map_err(io::Error::other)?;
            self.kick_poller.add(&fd, token, EpollFlags::EPOLLIN)?;
            self.kicks[index] = Some(fd);
        }
        Ok(())
    }

    /// Lets the device use queue `index`, or takes it away. The device is
    /// reset when its last queue goes. The driver may have kicked a queue
    /// before it was listened to: what comes next is a call of
    /// [`Slot::kicked`] in the device's loop.
    pub fn enable(&mut self, index: usize, enable: bool) -> io::Result<()> {
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        self.queue(index)?;
        let queue = &mut self.queues[index];
        if !enable {
            queue.set_ready(false);
            if !self.queues.iter().any(QueueT::ready) {
                self.device.reset();
            }
            return Ok(());
        }
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(&self.mem) {
            queue.set_ready(false);
            return Err(invalid(format!("queue {index} lies outside of memory")));
        }
        Ok(())
    }

    /// Forgets the driver.
    pub fn reset(&mut self) -> io::Result<()> {
        for index in 0..self.queues.len() {
            self.set_kick(index, None)?;
            self.queues[index].reset();
        }
        self.device.reset();
        self.mem = GuestMemoryMmap::new();
        Ok(())
    }

    pub(crate) fn kick_ready(&mut self, token: u32) -> io::Result<()> {
        let index = token as usize;
        let Some(Some(kick)) = self.kicks.get(index) else {
            return Ok(());
        };
        match (&**kick).read(&mut [0; 8]) {
            // No eventfd: it would be ready for ever.
            Ok(0) => return self.set_kick(index, None),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        self.kicked(index)
    }

    pub(crate) fn kicked(&mut self, index: usize) -> io::Result<()> {
        if !self.queue(index)?.ready() {
            return Ok(());
        }
        self.with(|device, io| device.kicked(index, io))
    }

    /// Calls the device with what it may touch.
    pub(crate) fn with<R>(&mut self, call: impl FnOnce(&mut dyn Device, &mut Io<'_>) -> R) -> R {
        let mut io = Io {
            mem: &self.mem,
            queues: &mut self.queues,
            irq: &*self.irq,
        };
        call(&mut *self.device, &mut io)
    }
}

/// Where a queue's descriptors, available and used ring lie.
pub(crate) fn place_rings(queue: &mut Queue, [desc, avail, used]: [u64; 3]) {
    let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
    let (low, high) = halves(desc);
    queue.set_desc_table_address(low, high);
    let (low, high) = halves(avail);
    queue.set_avail_ring_address(low, high);
    let (low, high) = halves(used);
    queue.set_used_ring_address(low, high);
}

pub(crate) fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}
