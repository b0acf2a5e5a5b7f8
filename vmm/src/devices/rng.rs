//! Entropy device (virtio 1.2 §5.4), fed from the host's /dev/urandom.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::sys::epoll::EpollFlags;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{QueueOwnedT, QueueT};

use super::iov::split;
use super::{Device, Io, Poller};

/// Bytes for one request. Linux asks for a cache line or two; a guest that
/// asks for more gets a short answer and asks again.
const MAX_BYTES: usize = 4096;

pub struct Rng {
    source: File,
}

impl Rng {
    pub fn new(source: &Path) -> io::Result<Self> {
        Ok(Self {
            source: File::open(source)?,
        })
    }
}

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn set_features(&mut self, _features: u64) {}

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
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
                let written = match split(chain, io.mem) {
                    Ok((_, mut buffer)) => {
                        buffer.truncate(MAX_BYTES);
                        buffer.read_from(&self.source)?
                    }
                    Err(_) => 0,
                };
                queue
                    .add_used(io.mem, head, written as u32)
                    .map_err(io::Error::other)?;
            }
            if !queue
                .enable_notification(io.mem)
                .map_err(io::Error::other)?
            {
                break;
            }
        }
        if queue.needs_notification(io.mem).map_err(io::Error::other)? {
            io.irq.queue_used(index);
        }
        Ok(())
    }

    fn host_ready(&mut self, _: u32, _: EpollFlags, _: &mut Io<'_>) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}
}
