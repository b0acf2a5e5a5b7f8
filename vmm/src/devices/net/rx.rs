//! Packets to the guest.
//!
//! Enough buffers for the largest packet are held before the tap is read, so
//! that no packet is cut. While the guest offers fewer, the tap is not
//! watched and packets wait in its queue.

use std::collections::VecDeque;
use std::io;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::HEADER;
use super::tap::Tap;
use crate::devices::iov::Iov;
use crate::devices::queue::{broken, next_chain};
use crate::transport::invalid;

/// Packets moved before other devices of the loop get their turn.
const BUDGET: usize = 64;
/// An Ethernet frame of a 64 KiB packet, with its header.
const LARGEST: usize = HEADER + 14 + 65536;
/// Where `num_buffers` lies in the header (virtio 1.2 §5.1.6).
const NUM_BUFFERS: usize = 10;
/// Descriptors of one buffer.
const MAX_PARTS: usize = 1024;
/// Buffers in a row that cannot be used, before the driver counts as broken.
const MAX_UNFIT: u32 = 1024;

/// A chain taken from the queue and not yet filled. Addresses, not mappings:
/// the guest's memory may be set anew in between.
struct Buffer {
    head: u16,
    parts: Vec<(GuestAddress, u32)>,
    len: usize,
}

/// Why [`Rx::run`] stopped.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// The tap is empty, or others have their turn: watch it.
    Watch,
    /// The guest has too few buffers: its kick wakes us.
    NoBuffers,
}

pub(super) struct Rx {
    held: VecDeque<Buffer>,
    capacity: usize,
    mergeable: bool,
    /// Bytes that must be held before reading.
    needed: usize,
}

impl Rx {
    pub(super) fn new() -> Self {
        Self {
            held: VecDeque::new(),
            capacity: 0,
            mergeable: false,
            needed: LARGEST,
        }
    }

    /// `largest_frame` when the guest takes no segmented packets.
    pub(super) fn configure(&mut self, mergeable: bool, largest_frame: Option<usize>) {
        self.mergeable = mergeable;
        self.needed = largest_frame.map_or(LARGEST, |frame| HEADER + frame);
    }

    pub(super) fn reset(&mut self) {
        self.held.clear();
        self.capacity = 0;
    }

    /// Moves packets from the tap into the guest.
    pub(super) fn run(
        &mut self,
        tap: &Tap,
        queue: &mut Queue,
        mem: &GuestMemoryMmap,
    ) -> io::Result<Stopped> {
        for _ in 0..BUDGET {
            if !self.refill(queue, mem)? {
                return Ok(Stopped::NoBuffers);
            }
            let packet = match self.space(mem).read_from(tap) {
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Stopped::Watch),
                Err(e) if Tap::is_gone(&e) => return Err(tap.gone()),
                Err(e) => return Err(e),
            };
            self.deliver(packet, queue, mem)?;
        }
        Ok(Stopped::Watch)
    }

    fn enough(&self) -> bool {
        if self.mergeable {
            self.capacity >= self.needed
        } else {
            !self.held.is_empty()
        }
    }

    /// Holds enough buffers; false when the guest has too few for now.
    fn refill(&mut self, queue: &mut Queue, mem: &GuestMemoryMmap) -> io::Result<bool> {
        let mut unfit = 0;
        while !self.enough() {
            let Some(chain) = next_chain(queue, mem)? else {
                return Ok(false);
            };
            let head = chain.head_index();
            let mut probe = Iov::default();
            let mut parts = Vec::new();
            let mut sound = true;
            for descriptor in chain.writable() {
                let (addr, len) = (descriptor.addr(), descriptor.len());
                // No more than a list can take, so that a chain of 65535
                // empty buffers is not kept.
                sound = parts.len() < MAX_PARTS && probe.push(mem, addr, len).is_ok();
                if !sound {
                    break;
                }
                parts.push((addr, len));
            }
            let len = probe.len();
            if !sound || len < HEADER {
                unfit += 1;
                if unfit > MAX_UNFIT {
                    return Err(invalid(
                        "the driver gives receive buffers that hold no packet",
                    ));
                }
                queue.add_used(mem, head, 0).map_err(broken)?;
                continue;
            }
            self.capacity += len;
            self.held.push_back(Buffer { head, parts, len });
        }
        Ok(true)
    }

    /// The held buffers as one list; in order, no more than a read can take.
    fn space<'m>(&self, mem: &'m GuestMemoryMmap) -> Iov<'m> {
        let mut space = Iov::default();
        let count = if self.mergeable { self.held.len() } else { 1 };
        for &(addr, len) in self.held.iter().take(count).flat_map(|b| &b.parts) {
            if space.push(mem, addr, len).is_err() {
                break;
            }
        }
        space
    }

    fn deliver(
        &mut self,
        packet: usize,
        queue: &mut Queue,
        mem: &GuestMemoryMmap,
    ) -> io::Result<()> {
        let mut count = 0u16;
        let mut covered = 0;
        for buffer in &self.held {
            count += 1;
            covered += buffer.len;
            if covered >= packet {
                break;
            }
        }
        let mut header = self.space(mem);
        drop(header.take(NUM_BUFFERS));
        header.fill_from(&count.to_le_bytes());

        let mut left = packet;
        for buffer in self.held.drain(..usize::from(count)) {
            self.capacity -= buffer.len;
            let used = left.min(buffer.len);
            left -= used;
            queue
                .add_used(mem, buffer.head, used as u32)
                .map_err(broken)?;
        }
        Ok(())
    }
}
