//! The receive queue, device to guest, during one call of the device.

use std::io;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::packet::{HEADER_LEN, HOST_CID, Header, Ports, TYPE_STREAM};
use crate::devices::Interrupt;
use crate::devices::iov::{self, Iov};
use crate::devices::queue::{broken, next_chain};

/// Buffers in a row that are too small for a header or lie outside memory,
/// before the driver counts as broken. A sane driver makes none.
const MAX_BAD_BUFFERS: u32 = 1024;

/// Payload of one packet to the guest; Linux drops larger ones.
const MAX_PAYLOAD: usize = 64 * 1024;

pub(super) struct Rx<'a> {
    mem: &'a GuestMemoryMmap,
    queue: &'a mut Queue,
    guest_cid: u64,
    used_any: bool,
}

/// A buffer of the guest that was taken from the queue; it must go through
/// [`Rx::put`] or [`Rx::put_back`].
struct RxBuffer<'a> {
    index: u16,
    header: Iov<'a>,
    /// Room for a payload.
    payload: Iov<'a>,
}

/// Buffers in a row, for one read of a socket.
pub(super) struct Batch<'a> {
    buffers: Vec<RxBuffer<'a>>,
    /// All their room for payload.
    pub(super) room: Iov<'a>,
}

impl<'a> Rx<'a> {
    pub(super) fn new(mem: &'a GuestMemoryMmap, queue: &'a mut Queue, guest_cid: u64) -> Self {
        Self {
            mem,
            queue,
            guest_cid,
            used_any: false,
        }
    }

    /// The next buffer, its payload room cut to `most`. `None` when the guest
    /// has given no more: it will kick the queue once it has.
    fn take(&mut self, most: usize) -> io::Result<Option<RxBuffer<'a>>> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let mut bad = 0;
        while let Some(chain) = next_chain(self.queue, self.mem)? {
            let index = chain.head_index();
            if let Ok((_, mut payload)) = iov::split(chain, self.mem) {
                let header = payload.take(HEADER_LEN);
                payload.truncate(most);
                if header.len() == HEADER_LEN && (most == 0 || !payload.is_empty()) {
                    return Ok(Some(RxBuffer {
                        index,
                        header,
                        payload,
                    }));
                }
            }
            bad += 1;
            if bad > MAX_BAD_BUFFERS {
                return Err(io::Error::other(
                    "the vsock driver gives receive buffers that cannot be used",
                ));
            }
            self.add_used(index, 0)?;
        }
        Ok(None)
    }

    /// The next `count` buffers, or as many as there are, until they have room
    /// for `most` bytes. `None` when there is none.
    pub(super) fn gather(&mut self, count: usize, most: usize) -> io::Result<Option<Batch<'a>>> {
        let mut batch = Batch {
            buffers: Vec::with_capacity(count),
            room: Iov::default(),
        };
        while batch.buffers.len() < count && batch.room.len() < most {
            let left = most - batch.room.len();
            let Some(buffer) = self.take(left.min(MAX_PAYLOAD))? else {
                break;
            };
            if !batch.room.extend(&buffer.payload) {
                self.put_back(buffer);
                break;
            }
            batch.buffers.push(buffer);
        }
        Ok((!batch.buffers.is_empty()).then_some(batch))
    }

    /// Hands as many of the buffers to the guest as the `len` bytes of payload
    /// in them fill, each with `header`, and takes the others back.
    pub(super) fn put_batch(
        &mut self,
        batch: Batch<'a>,
        len: usize,
        ports: Ports,
        header: Header,
    ) -> io::Result<()> {
        let mut left = len;
        for buffer in batch.buffers {
            if left == 0 {
                self.put_back(buffer);
                continue;
            }
            let here = left.min(buffer.payload.len());
            left -= here;
            let len = u32::try_from(here).map_err(io::Error::other)?;
            self.put(&buffer, ports, Header { len, ..header })?;
        }
        Ok(())
    }

    /// Hands a buffer to the guest: `header` (addresses and type are filled
    /// in) and `header.len` bytes of payload that are in it already.
    fn put(&mut self, buffer: &RxBuffer<'_>, ports: Ports, mut header: Header) -> io::Result<()> {
        header.src_cid = HOST_CID;
        header.dst_cid = self.guest_cid;
        header.src_port = ports.host;
        header.dst_port = ports.guest;
        if header.kind == 0 {
            header.kind = TYPE_STREAM;
        }
        buffer.header.fill_from(&header.encode());
        let header_len = u32::try_from(HEADER_LEN).map_err(io::Error::other)?;
        self.add_used(buffer.index, header_len + header.len)
    }

    /// Returns the buffer taken last, unused.
    fn put_back(&mut self, _buffer: RxBuffer<'_>) {
        self.queue.go_to_previous_position();
    }

    /// Sends a packet without payload; false when there is no buffer.
    pub(super) fn send(&mut self, ports: Ports, header: Header) -> io::Result<bool> {
        let Some(buffer) = self.take(0)? else {
            return Ok(false);
        };
        self.put(&buffer, ports, header)?;
        Ok(true)
    }

    fn add_used(&mut self, index: u16, len: u32) -> io::Result<()> {
        self.queue.add_used(self.mem, index, len).map_err(broken)?;
        self.used_any = true;
        Ok(())
    }

    /// Interrupts the guest if it wants to know of what was put.
    pub(super) fn finish(self, queue_index: usize, irq: &dyn Interrupt) -> io::Result<()> {
        if self.used_any && self.queue.needs_notification(self.mem).map_err(broken)? {
            irq.queue_used(queue_index);
        }
        Ok(())
    }
}
