//! A driver for unit tests: split rings in a memory of its own.

use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::hostile::descriptor;
use super::{Device, Interrupt, Io};
use crate::transport::place_rings;

const SIZE: u16 = 256;
const RING_SPACE: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

#[derive(Default)]
pub struct Irqs {
    pub used: AtomicUsize,
    pub config: AtomicUsize,
}

impl Interrupt for Irqs {
    fn queue_used(&self, _: usize) {
        self.used.fetch_add(1, Ordering::Relaxed);
    }

    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }
}

pub struct Driver {
    pub mem: GuestMemoryMmap,
    pub irqs: Irqs,
    queues: Vec<Queue>,
    next_desc: Vec<u16>,
    avail: Vec<u16>,
    seen: Vec<u16>,
    next_buffer: u64,
}

/// A buffer to put into a chain.
pub enum Part<'a> {
    Read(&'a [u8]),
    Write(u32),
    /// Any address, valid or not.
    Raw {
        addr: u64,
        len: u32,
        write: bool,
    },
}

/// A chain as the driver remembers it.
pub struct Chain {
    pub head: u16,
    pub writable: Vec<(u64, u32)>,
}

impl Driver {
    pub fn new(device: &dyn Device) -> Self {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        Self::with_memory(device, mem)
    }

    /// The rings take the first pages of `mem`.
    pub fn with_memory(device: &dyn Device, mem: GuestMemoryMmap) -> Self {
        let count = device.queue_sizes().len();
        let rings = RING_SPACE * count as u64;
        let queues = (0..count as u64)
            .map(|i| {
                let base = RING_SPACE * i;
                let mut queue = Queue::new(SIZE).unwrap();
                place_rings(&mut queue, [base, base + AVAIL, base + USED]);
                queue.set_ready(true);
                queue
            })
            .collect();
        Self {
            mem,
            irqs: Irqs::default(),
            queues,
            next_desc: vec![0; count],
            avail: vec![0; count],
            seen: vec![0; count],
            next_buffer: rings,
        }
    }

    /// Makes a chain available in queue `queue`.
    pub fn push(&mut self, queue: usize, parts: &[Part<'_>]) -> Chain {
        let base = RING_SPACE * queue as u64;
        let head = self.next_desc[queue];
        let mut writable = Vec::new();
        for (n, part) in parts.iter().enumerate() {
            let (addr, len, write) = match *part {
                Part::Read(bytes) => {
                    let addr = self.allocate(bytes.len() as u32);
                    self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
                    (addr, bytes.len() as u32, false)
                }
                Part::Write(len) => (self.allocate(len), len, true),
                Part::Raw { addr, len, write } => (addr, len, write),
            };
            if write {
                writable.push((addr, len));
            }
            let index = self.next_desc[queue];
            self.next_desc[queue] = (index + 1) % SIZE;
            let mut flags = if write { VRING_DESC_F_WRITE } else { 0 };
            if n + 1 < parts.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            let bytes = descriptor((addr, len, flags as u16, self.next_desc[queue]));
            let at = GuestAddress(base + 16 * u64::from(index));
            self.mem.write_slice(&bytes, at).unwrap();
        }
        let slot = u64::from(self.avail[queue] % SIZE);
        let ring = GuestAddress(base + AVAIL + 4 + 2 * slot);
        self.mem.write_obj(head, ring).unwrap();
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        let index = GuestAddress(base + AVAIL + 2);
        self.mem.write_obj(self.avail[queue], index).unwrap();
        Chain { head, writable }
    }

    fn allocate(&mut self, len: u32) -> u64 {
        let addr = self.next_buffer;
        self.next_buffer += u64::from(len).next_multiple_of(16);
        addr
    }

    /// Calls the device as its event loop would.
    pub fn with<D: Device, R>(
        &mut self,
        device: &mut D,
        call: impl FnOnce(&mut D, &mut Io<'_>) -> R,
    ) -> R {
        let mut io = Io {
            mem: &self.mem,
            queues: &mut self.queues,
            irq: &self.irqs,
        };
        call(device, &mut io)
    }

    pub fn kick<D: Device>(&mut self, device: &mut D, queue: usize) {
        self.with(device, |device, io| device.kicked(queue, io))
            .unwrap();
    }

    /// The next used element of a queue: head and bytes written.
    pub fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let base = RING_SPACE * queue as u64 + USED;
        let index: u16 = self.mem.read_obj(GuestAddress(base + 2)).unwrap();
        if index == self.seen[queue] {
            return None;
        }
        let slot = u64::from(self.seen[queue] % SIZE);
        self.seen[queue] = self.seen[queue].wrapping_add(1);
        let at = base + 4 + 8 * slot;
        let head = self.mem.read_obj(GuestAddress(at)).unwrap();
        let len = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head, len))
    }

    /// The first `len` bytes of a chain's writable buffers.
    pub fn read(&self, chain: &Chain, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &(addr, size) in &chain.writable {
            let mut part = vec![0; size as usize];
            self.mem.read_slice(&mut part, GuestAddress(addr)).unwrap();
            bytes.extend(part);
        }
        bytes.truncate(len);
        bytes
    }
}
