//! Entropy device (virtio 1.2 §5.4), fed from the host's /dev/urandom.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::sys::epoll::EpollFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{QueueOwnedT, QueueT};

use super::again::Again;
use super::iov::split;
use super::{Device, Io, Poller};

const QUEUE: usize = 0;
const AGAIN: u32 = 0;

/// Bytes for one request. Linux asks for a cache line or two; a guest that
/// asks for more gets a short answer and asks again.
const MAX_BYTES: usize = 4096;
/// Requests handled before other devices of the loop get their turn.
const REQUESTS_PER_TURN: usize = 16;

/// What the guest can see of the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The driver's choice of features.
    pub features: u64,
}

pub struct Rng {
    state: State,
    source: File,
    again: Again,
}

impl Rng {
    pub fn new(source: &Path) -> io::Result<Self> {
        Ok(Self {
            state: State::default(),
            source: File::open(source)?,
            again: Again::new()?,
        })
    }

    pub fn state(&self) -> State {
        self.state.clone()
    }

    fn serve(&mut self, io: &mut Io<'_>) -> io::Result<()> {
        if !io.queues[QUEUE].ready() {
            return Ok(());
        }
        let before = io.queues[QUEUE].next_used();
        let mut left = REQUESTS_PER_TURN;
        while let Some(chain) = io.next_chain(QUEUE)? {
            if left == 0 {
                io.queues[QUEUE].go_to_previous_position();
                self.again.ring()?;
                break;
            }
            left -= 1;
            let head = chain.head_index();
            let written = match split(chain, io.mem) {
                Ok((_, mut buffer)) => {
                    buffer.truncate(MAX_BYTES);
                    buffer.read_from(&self.source)?
                }
                Err(_) => 0,
            };
            io.give_back(QUEUE, head, written as u32)?;
        }
        io.notify_since(QUEUE, before)
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

    fn set_features(&mut self, features: u64) {
        self.state.features = features;
    }

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn start(&mut self, poller: Poller) -> io::Result<()> {
        self.again.watch(&poller, AGAIN)
    }

    fn kicked(&mut self, _: usize, io: &mut Io<'_>) -> io::Result<()> {
        self.serve(io)
    }

    fn host_ready(&mut self, _: u32, _: EpollFlags, io: &mut Io<'_>) -> io::Result<()> {
        self.again.take()?;
        self.serve(io)
    }

    fn reset(&mut self) {
        self.state = State::default();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};

    use super::*;
    use crate::devices::test_driver::{Driver, Part};

    #[test]
    fn requests_are_answered_in_turns_and_cut_to_size() {
        let mut rng = Rng::new(Path::new("/dev/urandom")).unwrap();
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
        rng.start(Poller::new(epoll.clone(), 0)).unwrap();
        let mut driver = Driver::new(&rng);
        let large = driver.push(QUEUE, &[Part::Write(100_000)]);
        for _ in 0..REQUESTS_PER_TURN {
            driver.push(QUEUE, &[Part::Write(64)]);
        }
        driver.kick(&mut rng, QUEUE);
        assert_eq!(driver.used(QUEUE), Some((u32::from(large.head), 4096)));
        let bytes = driver.read(&large, 4096);
        assert!((0..=255).all(|b| bytes.contains(&b)), "little entropy");
        let rest = REQUESTS_PER_TURN - 1;
        let mut count = || std::iter::from_fn(|| driver.used(QUEUE)).count();
        assert_eq!(count(), rest);
        let mut events = [EpollEvent::empty(); 4];
        assert_eq!(epoll.wait(&mut events, EpollTimeout::ZERO).unwrap(), 1);
        let again = |rng: &mut Rng, io: &mut Io<'_>| rng.host_ready(AGAIN, EpollFlags::EPOLLIN, io);
        driver.with(&mut rng, again).unwrap();
        assert_eq!(driver.used(QUEUE).map(|(_, len)| len), Some(64));
        assert_eq!(epoll.wait(&mut events, EpollTimeout::ZERO).unwrap(), 0);
    }

    #[test]
    fn a_kick_without_a_request_interrupts_nobody() {
        let mut rng = Rng::new(Path::new("/dev/urandom")).unwrap();
        let mut driver = Driver::new(&rng);
        driver.push(QUEUE, &[Part::Write(64)]);
        driver.kick(&mut rng, QUEUE);
        driver.kick(&mut rng, QUEUE);
        assert_eq!(driver.irqs.used.load(Ordering::Relaxed), 1);
    }
}
