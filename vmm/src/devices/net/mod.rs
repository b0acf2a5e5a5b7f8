//! Network device (virtio 1.2 §5.1): one queue pair on a tap, with checksum
//! and TCP segmentation offload both ways and mergeable receive buffers.

mod rx;
mod tap;

use std::fs::File;
use std::io;

use nix::sys::epoll::EpollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};

use self::rx::{Rx, Stopped};
use self::tap::{Offloads, Tap};
use super::iov::split;
use super::{Device, Io, Poller, read_config_bytes};

pub use tap::TapError;

/// virtio_net_hdr_v1.
const HEADER: usize = 12;
const RX: usize = 0;
const TX: usize = 1;
/// Packets sent before other devices of the loop get their turn.
const TX_BUDGET: usize = 64;
/// The MTU where none is set.
const DEFAULT_MTU: u16 = 1500;
/// Ethernet header and a VLAN tag.
const FRAME_OVERHEAD: usize = 18;

const TAP: u32 = 0;
const TX_AGAIN: u32 = 1;

pub struct Net {
    tap: Tap,
    mac: [u8; 6],
    mtu: Option<u16>,
    rx: Rx,
    poller: Option<Poller>,
    watching: bool,
    dead: bool,
    /// Raised by the device itself when it left packets unsent.
    tx_again: EventFd,
}

impl Net {
    /// `tap` is IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
    pub fn new(tap: File, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, TapError> {
        let tx_again = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| TapError::Setup(e.into()))?;
        Ok(Self {
            tap: Tap::new(tap)?,
            mac,
            mtu,
            rx: Rx::new(),
            poller: None,
            watching: false,
            dead: false,
            tx_again,
        })
    }

    fn watch(&mut self, on: bool) -> io::Result<()> {
        if on == self.watching {
            return Ok(());
        }
        let poller = self.poller.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        if on {
            poller.add(&self.tap, TAP, EpollFlags::EPOLLIN)?;
        } else {
            poller.remove(&self.tap)?;
        }
        self.watching = on;
        Ok(())
    }

    fn receive(&mut self, io: &mut Io<'_>) -> io::Result<()> {
        let queue = &mut io.queues[RX];
        if !queue.ready() || self.dead {
            return self.watch(false);
        }
        let stopped = self.rx.run(&self.tap, queue, io.mem)?;
        if queue.needs_notification(io.mem).map_err(io::Error::other)? {
            io.irq.queue_used(RX);
        }
        self.dead = stopped == Stopped::Dead;
        self.watch(stopped == Stopped::Watch)
    }

    fn transmit(&mut self, io: &mut Io<'_>) -> io::Result<()> {
        let queue = &mut io.queues[TX];
        if !queue.ready() {
            return Ok(());
        }
        queue
            .disable_notification(io.mem)
            .map_err(io::Error::other)?;
        let mut sent = 0;
        let done = loop {
            if sent == TX_BUDGET {
                break false;
            }
            let next = queue.iter(io.mem).map_err(io::Error::other)?.next();
            let Some(chain) = next else {
                if queue
                    .enable_notification(io.mem)
                    .map_err(io::Error::other)?
                {
                    continue;
                }
                break true;
            };
            sent += 1;
            let head = chain.head_index();
            if let Ok((packet, _)) = split(chain, io.mem)
                && let Err(error) = packet.write_to(&self.tap)
            {
                // As a wire would: what cannot be sent is lost.
                tracing::trace!(%error, "packet dropped");
            }
            queue.add_used(io.mem, head, 0).map_err(io::Error::other)?;
        };
        if queue.needs_notification(io.mem).map_err(io::Error::other)? {
            io.irq.queue_used(TX);
        }
        if !done {
            self.tx_again.write(1)?;
        }
        Ok(())
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256]
    }

    fn features(&self) -> u64 {
        let mtu = self.mtu.map_or(0, |_| 1 << VIRTIO_NET_F_MTU);
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | mtu
    }

    fn set_features(&mut self, features: u64) {
        let has = |bit: u32| features & (1 << bit) != 0;
        let offloads = Offloads {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(VIRTIO_NET_F_GUEST_TSO6),
        };
        let segmented = offloads.tso4 || offloads.tso6;
        let mtu = usize::from(self.mtu.unwrap_or(DEFAULT_MTU));
        let largest = (!segmented).then_some(mtu + FRAME_OVERHEAD);
        self.rx.configure(has(VIRTIO_NET_F_MRG_RXBUF), largest);
        if let Err(error) = self.tap.set_offloads(offloads) {
            tracing::warn!(%error, ?offloads, "the tap takes no offloads");
        }
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        // max_virtqueue_pairs
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.unwrap_or(DEFAULT_MTU).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn start(&mut self, poller: Poller) -> io::Result<()> {
        poller.add(&self.tx_again, TX_AGAIN, EpollFlags::EPOLLIN)?;
        self.poller = Some(poller);
        Ok(())
    }

    fn kicked(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()> {
        if index == TX {
            return self.transmit(io);
        }
        io.queues[RX]
            .disable_notification(io.mem)
            .map_err(io::Error::other)?;
        self.receive(io)
    }

    fn host_ready(&mut self, token: u32, _: EpollFlags, io: &mut Io<'_>) -> io::Result<()> {
        if token == TX_AGAIN {
            // Spurious at worst: the queue is what counts.
            let _ = self.tx_again.read();
            return self.transmit(io);
        }
        self.receive(io)
    }

    fn reset(&mut self) {
        self.rx.reset();
        if let Err(error) = self.watch(false) {
            tracing::warn!(%error, "cannot stop watching the tap");
        }
    }
}

#[cfg(test)]
mod tests;
