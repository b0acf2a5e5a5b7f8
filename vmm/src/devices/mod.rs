//! Virtio devices (virtio 1.2), apart from what carries them.
//!
//! A [`Device`] is a passive state machine. A transport (vhost-user for the
//! `uml` machine, virtio-mmio for `kvm`) owns its queues and an event loop
//! calls it: when the guest kicked a queue, or when a descriptor the device
//! registered with its [`Poller`] is ready. A device never blocks in a call,
//! never trusts a length or an address of the guest, and bounds what it holds.

mod again;
pub mod balloon;
pub mod blk;
pub mod fs;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
pub mod iov;
pub mod net;
mod queue;
pub mod rng;
#[cfg(test)]
mod test_driver;
pub mod vsock;

use std::any::Any;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

/// Tells the driver about the device's side of a queue or its config space.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` were used.
    fn queue_used(&self, index: usize);
    /// The configuration space changed (virtio 1.2 §2.5).
    fn config_changed(&self);
}

/// What a device may touch during one call.
pub struct Io<'a> {
    pub mem: &'a GuestMemoryMmap,
    /// All queues of the device; one that the driver has not set up is not
    /// `ready()` and must be left alone.
    pub queues: &'a mut [Queue],
    pub irq: &'a dyn Interrupt,
}

pub trait Device: Any + Send {
    /// Virtio device id (virtio 1.2 §5).
    fn id(&self) -> u32;

    /// The largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits offered, without those of the transport. VERSION_1 and
    /// the ring features (EVENT_IDX, INDIRECT_DESC) included where supported.
    fn features(&self) -> u64;

    /// The driver's choice among [`Device::features`].
    fn set_features(&mut self, features: u64);

    /// Copies the configuration space from `offset`; bytes past its end are 0.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// The driver wrote its configuration space. Most devices have nothing
    /// writable there.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// Called once, before any other event, with the means to watch host
    /// descriptors.
    fn start(&mut self, poller: Poller) -> io::Result<()>;

    /// The driver kicked queue `index`.
    fn kicked(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()>;

    /// A registered descriptor is ready. An error here or in
    /// [`Device::kicked`] means the guest broke the protocol beyond repair or
    /// the host side failed for good: the machine is ended with that reason.
    fn host_ready(&mut self, token: u32, flags: EpollFlags, io: &mut Io<'_>) -> io::Result<()>;

    /// The driver reset the device: forget the guest's side.
    fn reset(&mut self);
}

/// Registers host descriptors of one device with the event loop (level
/// triggered, by epoll). The loop finds the device again by `tag`, which fills
/// the upper half of the epoll datum; the device's `token` fills the lower.
#[derive(Clone)]
pub struct Poller {
    epoll: Arc<Epoll>,
    tag: u32,
}

impl Poller {
    #[must_use]
    pub fn new(epoll: Arc<Epoll>, tag: u32) -> Self {
        Self { epoll, tag }
    }

    fn datum(&self, token: u32) -> u64 {
        (u64::from(self.tag) << 32) | u64::from(token)
    }

    pub fn add(&self, fd: impl AsFd, token: u32, flags: EpollFlags) -> io::Result<()> {
        Ok(self
            .epoll
            .add(fd, EpollEvent::new(flags, self.datum(token)))?)
    }

    pub fn modify(&self, fd: impl AsFd, token: u32, flags: EpollFlags) -> io::Result<()> {
        let mut event = EpollEvent::new(flags, self.datum(token));
        Ok(self.epoll.modify(fd, &mut event)?)
    }

    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(fd)?)
    }
}

/// Copies a device's configuration space from `offset`; past its end are zeroes.
pub(crate) fn read_config_bytes(config: &[u8], offset: usize, data: &mut [u8]) {
    data.fill(0);
    if let Some(rest) = config.get(offset..) {
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use serde::Serialize;
    use serde::de::DeserializeOwned;

    use super::*;

    fn survives<S: Serialize + DeserializeOwned + PartialEq + Debug>(state: &S) {
        let saved = serde_json::to_vec(state).unwrap();
        assert_eq!(&serde_json::from_slice::<S>(&saved).unwrap(), state);
    }

    /// What a snapshot will hold of a device is data and nothing else.
    #[test]
    fn the_state_of_a_device_can_be_saved_and_read_back() {
        let mut blk = blk::Blk::empty("image0").unwrap();
        blk.set_features(blk.features());
        assert_ne!(blk.state().features, 0);
        survives(&blk.state());
        let mut balloon = balloon::Balloon::new(0).unwrap();
        balloon.write_config(4, &[7]);
        survives(&balloon.state());
        let mut rng = rng::Rng::new("/dev/zero".as_ref()).unwrap();
        rng.set_features(u64::MAX);
        survives(&rng.state());
        let dir = tempfile::tempdir().unwrap();
        let files = crate::files::on_thread::start(dir.path(), None, || {}).unwrap();
        survives(&fs::Fs::new(files, "shared").unwrap().state());
        survives(&net::State {
            features: 1,
            mac: [2; 6],
            mtu: Some(1400),
            active_pairs: 2,
        });
        survives(&vsock::State {
            features: u64::MAX,
            guest_cid: 3,
        });
    }
}
