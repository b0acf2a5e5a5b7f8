//! The memory in which the `virtiofsd` library finds a request and leaves its
//! reply: the file server's own, in the shape of a virtqueue, since the library
//! takes nothing else.

use std::io;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::channel::{MAX_REPLY, MAX_REQUEST};
use crate::transport::place_rings;

/// One request is in it at a time: two descriptors.
const QUEUE_SIZE: u16 = 2;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
const REQUEST: u64 = 0x1000;
const REPLY: u64 = REQUEST + (MAX_REQUEST as u64).next_multiple_of(0x1000);
const SIZE: usize = REPLY as usize + MAX_REPLY.next_multiple_of(0x1000);

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;

/// Made with the bitmap type that the library asks for.
pub(super) struct Buffers {
    memory: Memory,
    queue: Queue,
    available: u16,
}

type Memory = GuestMemoryMmap<vhost_user_backend::bitmap::BitmapMmapRegion>;

impl Buffers {
    pub(super) fn new() -> io::Result<Self> {
        let memory = Memory::from_ranges(&[(GuestAddress(0), SIZE)]).map_err(io::Error::other)?;
        let mut queue = Queue::new(QUEUE_SIZE).map_err(io::Error::other)?;
        place_rings(&mut queue, [DESCRIPTORS, AVAILABLE, USED]);
        queue.set_ready(true);
        Ok(Self {
            memory,
            queue,
            available: 0,
        })
    }

    /// Puts `request` in, with `room` for its reply; both are within bounds.
    pub(super) fn hold(
        &mut self,
        request: &[u8],
        room: usize,
    ) -> io::Result<(Reader<'_>, Writer<'_>)> {
        let put = |at: u64, bytes: &[u8]| {
            self.memory
                .write_slice(bytes, GuestAddress(at))
                .map_err(io::Error::other)
        };
        put(REQUEST, request)?;
        let length = |len: usize| u32::try_from(len).map_err(io::Error::other);
        let next = if room > 0 { FLAG_NEXT } else { 0 };
        put(
            DESCRIPTORS,
            &descriptor(REQUEST, length(request.len())?, next, 1),
        )?;
        put(
            DESCRIPTORS + 16,
            &descriptor(REPLY, length(room)?, FLAG_WRITE, 0),
        )?;
        let slot = u64::from(self.available % QUEUE_SIZE);
        put(AVAILABLE + 4 + 2 * slot, &0_u16.to_le_bytes())?;
        self.available = self.available.wrapping_add(1);
        put(AVAILABLE + 2, &self.available.to_le_bytes())?;

        let chain = self
            .queue
            .iter(&self.memory)
            .map_err(io::Error::other)?
            .next();
        let chain = chain.ok_or_else(|| io::Error::other("no chain in a queue of one"))?;
        let reader = Reader::new(&self.memory, chain.clone()).map_err(io::Error::other)?;
        let writer = Writer::new(&self.memory, chain).map_err(io::Error::other)?;
        Ok((reader, writer))
    }

    /// The first `length` bytes of the reply.
    pub(super) fn reply(&self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length.min(MAX_REPLY)];
        self.memory
            .read_slice(&mut bytes, GuestAddress(REPLY))
            .map_err(io::Error::other)?;
        Ok(bytes)
    }
}

/// Virtio 1.2 §2.7.5.
fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
