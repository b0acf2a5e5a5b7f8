//! Block device (virtio 1.2 §5.2): an image's layers, read-only and attached
//! while the guest runs, or the pod's scratch disk.
//!
//! A slot without a disk has capacity 0. Attaching one sets the capacity and
//! raises a config-change interrupt.

mod backing;
mod request;

use std::fs::File;
use std::io;

use nix::sys::epoll::EpollFlags;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};

pub use backing::{AttachError, Backing};

use super::{Device, Io, Poller, read_config_bytes};

const SECTOR: u64 = 512;
/// Data buffers in one request: a queue without its header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
const QUEUE_SIZE: u16 = 256;
/// Ranges in one discard or write-zeroes request.
const RANGES_MAX: u32 = 64;
/// Sectors in one of those ranges: 2 GiB.
const RANGE_SECTORS_MAX: u32 = 1 << 22;
/// Length of the serial in GET_ID (VIRTIO_BLK_ID_BYTES).
const SERIAL_BYTES: usize = 20;

pub struct Blk {
    serial: [u8; SERIAL_BYTES],
    read_only: bool,
    backing: Backing,
}

impl Blk {
    /// An empty slot for read-only disks; `serial` is cut to 20 bytes.
    pub fn empty(serial: &str) -> Self {
        Self::new(serial, true, Backing::Empty)
    }

    /// A read-write disk backed by `file`.
    pub fn scratch(serial: &str, file: File) -> Result<Self, AttachError> {
        Ok(Self::new(serial, false, Backing::disk(file)?))
    }

    fn new(serial: &str, read_only: bool, backing: Backing) -> Self {
        let mut bytes = [0; SERIAL_BYTES];
        for (to, from) in bytes.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self {
            serial: bytes,
            read_only,
            backing,
        }
    }

    /// Backs an empty slot by `files`, one after another.
    pub fn attach(&mut self, files: Vec<File>, io: &Io<'_>) -> Result<(), AttachError> {
        if !matches!(self.backing, Backing::Empty) {
            return Err(AttachError::InUse);
        }
        self.backing = Backing::image(files)?;
        io.irq.config_changed();
        Ok(())
    }

    /// Takes the disk away; requests for it fail from now on. An empty slot
    /// stays empty.
    pub fn detach(&mut self, io: &Io<'_>) {
        if self.read_only && !matches!(self.backing, Backing::Empty) {
            self.backing = Backing::Empty;
            io.irq.config_changed();
        }
    }

    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        config[0..8].copy_from_slice(&(self.backing.capacity() / SECTOR).to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        if !self.read_only {
            for at in [36, 48] {
                config[at..at + 4].copy_from_slice(&RANGE_SECTORS_MAX.to_le_bytes());
                config[at + 4..at + 8].copy_from_slice(&RANGES_MAX.to_le_bytes());
            }
            // discard_sector_alignment, then write_zeroes_may_unmap.
            config[44..48].copy_from_slice(&8u32.to_le_bytes());
            config[56] = 1;
        }
        config
    }
}

impl Device for Blk {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX;
        if self.read_only {
            common | 1 << VIRTIO_BLK_F_RO
        } else {
            common
                | 1 << VIRTIO_BLK_F_FLUSH
                | 1 << VIRTIO_BLK_F_DISCARD
                | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn set_features(&mut self, _features: u64) {}

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn start(&mut self, _poller: Poller) -> io::Result<()> {
        Ok(())
    }

    fn kicked(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()> {
        let queue = &mut io.queues[index];
        loop {
            queue
                .disable_notification(io.mem)
                .map_err(io::Error::other)?;
            loop {
                let next = queue.iter(io.mem).map_err(io::Error::other)?.next();
                let Some(chain) = next else { break };
                let head = chain.head_index();
                let written = self.serve(chain, io.mem);
                queue
                    .add_used(io.mem, head, written)
                    .map_err(io::Error::other)?;
                if queue.needs_notification(io.mem).map_err(io::Error::other)? {
                    io.irq.queue_used(index);
                }
            }
            if !queue
                .enable_notification(io.mem)
                .map_err(io::Error::other)?
            {
                return Ok(());
            }
        }
    }

    fn host_ready(&mut self, _: u32, _: EpollFlags, _: &mut Io<'_>) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests;
