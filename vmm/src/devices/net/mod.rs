//! Network device (virtio 1.2 §5.1): queue pairs on a tap, one for each of its
//! queues that was handed over, with checksum and segmentation offload both
//! ways and mergeable receive buffers.
//!
//! The tap is the pod's network for good: when it goes, the machine ends with
//! a reason that names it.

mod control;
mod outgoing;
mod pair;
mod rx;
mod tap;

use std::fs::File;
use std::io;

use nix::sys::epoll::EpollFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

use self::pair::{ITS_END, Pair};
use self::tap::{Offloads, Tap};
use super::again::Again;
use super::{Device, Io, Poller, read_config_bytes};

pub use tap::TapError;

/// virtio_net_hdr_v1.
const HEADER: usize = 12;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// The MTU where none is set.
const DEFAULT_MTU: u16 = 1500;
/// Ethernet header and a VLAN tag.
const FRAME_OVERHEAD: usize = 18;

/// Tokens below are numbers of pairs.
const AGAIN: u32 = u32::MAX;

/// What the guest can see of the device. Receive buffers that were taken from
/// a queue and hold no packet yet go back before a snapshot is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The driver's choice of features.
    pub features: u64,
    pub mac: [u8; 6],
    pub mtu: Option<u16>,
    /// Queue pairs in use; at least one.
    pub active_pairs: u16,
}

pub struct Net {
    state: State,
    /// What the host's tap can do.
    host: Offloads,
    pairs: Vec<Pair>,
    queue_sizes: Vec<u16>,
    poller: Option<Poller>,
    again: Again,
}

impl Net {
    /// `taps` are the queues of one tap, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR and,
    /// if they are several, IFF_MULTI_QUEUE; each makes a queue pair.
    pub fn new(taps: Vec<File>, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, TapError> {
        let mut taps = Tap::queues(taps)?;
        // Packets shall not be steered to where nobody looks.
        for tap in &mut taps[1..] {
            tap.attach(false).map_err(TapError::Setup)?;
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * taps.len()];
        if taps.len() > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        Ok(Self {
            state: State {
                features: 0,
                mac,
                mtu,
                active_pairs: 1,
            },
            host: taps[0].probe(),
            pairs: (0..).zip(taps).map(|(i, tap)| Pair::new(tap, i)).collect(),
            queue_sizes,
            poller: None,
            again: Again::new().map_err(TapError::Setup)?,
        })
    }

    pub fn state(&self) -> State {
        self.state.clone()
    }

    fn pair_count(&self) -> u16 {
        // At most `tap::MAX_QUEUES`.
        self.pairs.len() as u16
    }

    fn has(&self, feature: u32) -> bool {
        self.state.features & (1 << feature) != 0
    }

    fn multi_queue(&self) -> bool {
        self.has(VIRTIO_NET_F_MQ)
    }

    /// The control queue comes after the last pair the driver knows of.
    fn control_queue(&self) -> Option<usize> {
        let pairs = if self.multi_queue() {
            self.pairs.len()
        } else {
            1
        };
        self.has(VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs)
    }

    fn active(&mut self) -> &mut [Pair] {
        &mut self.pairs[..usize::from(self.state.active_pairs)]
    }

    /// Steers packets to the first `count` pairs.
    fn use_pairs(&mut self, count: u16, io: &mut Io<'_>) -> io::Result<()> {
        self.select_pairs(count)?;
        let poller = self.poller.clone();
        for pair in self.active() {
            pair.receive(poller.as_ref(), io)?;
        }
        // New pairs may have something to send since before they were used.
        self.again.ring()
    }

    fn select_pairs(&mut self, count: u16) -> io::Result<()> {
        let poller = self.poller.as_ref();
        for (index, pair) in self.pairs.iter_mut().enumerate().skip(1) {
            let active = index < usize::from(count);
            if !active {
                pair.watch(poller, None)?;
            }
            pair.tap.attach(active)?;
            if active {
                pair.watch(poller, Some(ITS_END))?;
            }
        }
        self.state.active_pairs = count;
        Ok(())
    }

    fn transmit(&mut self, pair: usize, io: &mut Io<'_>) -> io::Result<()> {
        if !self.pairs[pair].transmit(io)? {
            self.again.ring()?;
        }
        Ok(())
    }

    fn serve_control(&mut self, io: &mut Io<'_>) -> io::Result<()> {
        if let Some(index) = self.control_queue()
            && !self.control(index, io)?
        {
            self.again.ring()?;
        }
        Ok(())
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let mut features = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
        ];
        if self.host.ufo {
            features.extend([VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO]);
        }
        if self.host.uso4 {
            features.extend([
                VIRTIO_NET_F_HOST_USO,
                VIRTIO_NET_F_GUEST_USO4,
                VIRTIO_NET_F_GUEST_USO6,
            ]);
        }
        if self.state.mtu.is_some() {
            features.push(VIRTIO_NET_F_MTU);
        }
        if self.pairs.len() > 1 {
            features.extend([VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
        }
        features.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn set_features(&mut self, features: u64) {
        self.state.features = features;
        let offloads = Offloads {
            checksum: self.has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: self.has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: self.has(VIRTIO_NET_F_GUEST_TSO6),
            ufo: self.has(VIRTIO_NET_F_GUEST_UFO),
            uso4: self.has(VIRTIO_NET_F_GUEST_USO4),
            uso6: self.has(VIRTIO_NET_F_GUEST_USO6),
        };
        let segmented = [
            offloads.tso4,
            offloads.tso6,
            offloads.ufo,
            offloads.uso4,
            offloads.uso6,
        ];
        let mtu = usize::from(self.state.mtu.unwrap_or(DEFAULT_MTU));
        let largest = (!segmented.contains(&true)).then_some(mtu + FRAME_OVERHEAD);
        let mergeable = self.has(VIRTIO_NET_F_MRG_RXBUF);
        for pair in &mut self.pairs {
            pair.rx.configure(mergeable, largest);
        }
        // The tap's, whichever queue it is told through.
        if let Err(error) = self.pairs[0].tap.set_offloads(offloads) {
            tracing::warn!(%error, ?offloads, "the tap takes no offloads");
        }
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.state.mac);
        // max_virtqueue_pairs
        config[8..10].copy_from_slice(&self.pair_count().to_le_bytes());
        let mtu = self.state.mtu.unwrap_or(DEFAULT_MTU);
        config[10..12].copy_from_slice(&mtu.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn start(&mut self, poller: Poller) -> io::Result<()> {
        self.again.watch(&poller, AGAIN)?;
        self.pairs[0].watch(Some(&poller), Some(ITS_END))?;
        self.poller = Some(poller);
        Ok(())
    }

    fn kicked(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()> {
        if self.control_queue() == Some(index) {
            return self.serve_control(io);
        }
        let pair = index / 2;
        // Queues of a pair not in use may be filled, but not served yet.
        if pair >= usize::from(self.state.active_pairs) {
            return Ok(());
        }
        if index == self.pairs[pair].tx_queue() {
            return self.transmit(pair, io);
        }
        io.queues[index]
            .disable_notification(io.mem)
            .map_err(io::Error::other)?;
        self.pairs[pair].receive(self.poller.as_ref(), io)
    }

    fn host_ready(&mut self, token: u32, flags: EpollFlags, io: &mut Io<'_>) -> io::Result<()> {
        if token == AGAIN {
            self.again.take()?;
            for pair in 0..usize::from(self.state.active_pairs) {
                self.transmit(pair, io)?;
            }
            return self.serve_control(io);
        }
        let poller = self.poller.clone();
        let Some(pair) = self.active().get_mut(token as usize) else {
            return Ok(());
        };
        if flags.contains(EpollFlags::EPOLLERR) {
            return Err(pair.tap.gone());
        }
        pair.receive(poller.as_ref(), io)
    }

    fn reset(&mut self) {
        self.state.features = 0;
        let mut quiet = self.select_pairs(1);
        for pair in &mut self.pairs {
            pair.rx.reset();
        }
        let poller = self.poller.clone();
        quiet = quiet.and(self.pairs[0].watch(poller.as_ref(), Some(ITS_END)));
        if let Err(error) = quiet {
            tracing::warn!(%error, "cannot stop watching the tap");
        }
    }
}

#[cfg(test)]
mod tests;
