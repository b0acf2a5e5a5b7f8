//! Block device (virtio 1.2 §5.2): the pod's scratch disk, or a slot for what
//! is attached while the guest runs: an image's layers, read-only, or a block
//! device of the node.
//!
//! A slot without a disk has capacity 0. Attaching one sets the capacity and
//! raises a config-change interrupt. What a driver may be told of a disk is
//! settled when it probes the slot, so every slot offers writes, flushes and
//! discards; those of a disk that is read-only are refused here.
//!
//! What the host has in its page cache is read at once, in the event loop; so
//! is a request that comes alone and is small. All else is handed over to
//! [`Workers`] and comes back as an event. Backing files are read and written,
//! never mapped: one that shrinks is an error, not a SIGBUS, and ends the
//! machine, as its guest has lost a disk.

mod backing;
mod flight;
mod limit;
mod request;
mod workers;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_client::RateLimit;

pub use backing::AttachError;
pub use workers::Workers;

use self::backing::{Backing, BackingError};
use self::flight::Flight;
use self::limit::Limiter;
use self::request::{Op, Outcome, Range, Request};
use super::{Device, Io, Poller, read_config_bytes};

const SECTOR: u64 = 512;
/// Data buffers in one request: a queue without its header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
const QUEUE_SIZE: u16 = 256;
/// Ranges in one discard or write-zeroes request, and sectors in one of them
/// (4 MiB). A host that cannot clear a range writes it, so one request comes
/// to 64 MiB at most, by which a rate limit can be overdrawn.
const RANGES_MAX: u32 = 16;
const RANGE_SECTORS_MAX: u32 = 1 << 13;
/// Length of the serial in GET_ID (VIRTIO_BLK_ID_BYTES).
const SERIAL_BYTES: usize = 20;
/// Requests looked at before other disks of the loop get their turn.
const REQUESTS_PER_TURN: usize = 64;
/// A larger request is copied by another thread, whatever the page cache has.
const AT_ONCE_BYTES: usize = 1 << 20;

const QUEUE: usize = 0;

const LANDED: u32 = 0;
const TIMER: u32 = 1;

/// What the guest can see of the device, but for requests under way: a
/// snapshot is made when there are none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The driver's choice of features.
    pub features: u64,
    pub serial: [u8; SERIAL_BYTES],
    /// Of what is attached now; an empty slot is.
    pub read_only: bool,
    /// Bytes; 0 while no disk is attached.
    pub capacity: u64,
}

pub struct Blk {
    state: State,
    /// Whether disks are attached to it and detached.
    is_slot: bool,
    backing: Arc<Backing>,
    /// Whether the host's file system can say that a read would wait.
    tells_cached: bool,
    flight: Flight,
    throttle: Option<Throttle>,
}

/// A rate limit in force.
struct Throttle {
    limiter: Limiter,
    since: Instant,
    /// Rings when the disk may go on.
    timer: TimerFd,
}

impl Blk {
    /// An empty slot; `serial` is cut to 20 bytes.
    pub fn empty(serial: &str) -> io::Result<Self> {
        Self::new(serial, true, Backing::Empty)
    }

    /// A read-write disk backed by `file`.
    pub fn scratch(serial: &str, file: File) -> Result<Self, AttachError> {
        Self::new(serial, false, Backing::disk(file)?).map_err(AttachError::Setup)
    }

    fn new(serial: &str, is_slot: bool, backing: Backing) -> io::Result<Self> {
        let mut bytes = [0; SERIAL_BYTES];
        for (to, from) in bytes.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            state: State {
                features: 0,
                serial: bytes,
                read_only: backing.is_read_only(),
                capacity: backing.capacity(),
            },
            is_slot,
            backing: Arc::new(backing),
            tells_cached: true,
            flight: Flight::new(Workers::default())?,
            throttle: None,
        })
    }

    /// Lets the disk share threads with others; by default it has its own.
    #[must_use]
    pub fn with_workers(mut self, workers: &Workers) -> Self {
        self.flight.use_workers(workers.clone());
        self
    }

    /// Limits what the disk moves; what is cleared counts as if it was
    /// written.
    pub fn with_rate_limit(mut self, limit: RateLimit) -> io::Result<Self> {
        let limiter = Limiter::new(limit, Duration::ZERO);
        if !limiter.is_off() {
            let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
            self.throttle = Some(Throttle {
                limiter,
                since: Instant::now(),
                timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            });
        }
        Ok(self)
    }

    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// Backs an empty slot by `files`, one after another.
    pub fn attach(&mut self, files: Vec<File>, io: &Io<'_>) -> Result<(), AttachError> {
        self.fill_slot(|| Backing::image(files), io)
    }

    /// Backs an empty slot by a block device of the host.
    pub fn attach_device(
        &mut self,
        device: File,
        read_only: bool,
        io: &Io<'_>,
    ) -> Result<(), AttachError> {
        self.fill_slot(|| Backing::device(device, read_only), io)
    }

    fn fill_slot(
        &mut self,
        backing: impl FnOnce() -> Result<Backing, AttachError>,
        io: &Io<'_>,
    ) -> Result<(), AttachError> {
        if !matches!(*self.backing, Backing::Empty) {
            return Err(AttachError::InUse);
        }
        self.set_backing(backing()?, io);
        Ok(())
    }

    /// Takes the disk away; requests for it fail from now on. An empty slot
    /// stays empty.
    pub fn detach(&mut self, io: &Io<'_>) {
        if self.is_slot && !matches!(*self.backing, Backing::Empty) {
            self.set_backing(Backing::Empty, io);
        }
    }

    fn set_backing(&mut self, backing: Backing, io: &Io<'_>) {
        self.state.capacity = backing.capacity();
        self.state.read_only = backing.is_read_only();
        self.backing = Arc::new(backing);
        self.tells_cached = true;
        io.irq.config_changed();
    }

    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        config[0..8].copy_from_slice(&(self.state.capacity / SECTOR).to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        for at in [36, 48] {
            config[at..at + 4].copy_from_slice(&RANGE_SECTORS_MAX.to_le_bytes());
            config[at + 4..at + 8].copy_from_slice(&RANGES_MAX.to_le_bytes());
        }
        // discard_sector_alignment, then write_zeroes_may_unmap.
        config[44..48].copy_from_slice(&8u32.to_le_bytes());
        config[56] = 1;
        config
    }

    /// Serves the queue as far as the limits of this turn, of the rate and of
    /// the requests under way allow. Each of them wakes the loop again.
    fn take_requests(&mut self, io: &mut Io<'_>) -> io::Result<()> {
        if !io.queues[QUEUE].ready() {
            return Ok(());
        }
        io.queues[QUEUE]
            .disable_notification(io.mem)
            .map_err(io::Error::other)?;
        for _ in 0..REQUESTS_PER_TURN {
            if self.flight.is_full() {
                return Ok(());
            }
            let Some(chain) = io.next_chain(QUEUE)? else {
                return Ok(());
            };
            let queue = &mut io.queues[QUEUE];
            // Where there is no request, none waits: the timer stays off.
            if self.must_wait()? {
                queue.go_to_previous_position();
                return Ok(());
            }
            let head = chain.head_index();
            let last = queue
                .avail_idx(io.mem, std::sync::atomic::Ordering::Acquire)
                .map_err(io::Error::other)?
                .0
                == queue.next_avail();
            let alone = last && self.flight.is_empty();
            let outcome = match Request::parse(chain, io.mem, &self.state) {
                Some(request) => self.serve(request, head, alone, io.mem),
                None => Some(Outcome::default()),
            };
            if let Some(outcome) = outcome {
                use_chain(head, outcome, io)?;
            }
        }
        self.flight.ring()
    }

    /// Whether the rate limit says so; the timer is set then.
    fn must_wait(&mut self) -> io::Result<bool> {
        let Some(throttle) = &mut self.throttle else {
            return Ok(false);
        };
        let Some(wait) = throttle.limiter.wait(throttle.since.elapsed()) else {
            return Ok(false);
        };
        let wait = Expiration::OneShot(TimeSpec::from_duration(wait));
        throttle.timer.set(wait, TimerSetTimeFlags::empty())?;
        Ok(true)
    }

    fn charge(&mut self, bytes: u64) {
        if let Some(throttle) = &mut self.throttle {
            throttle.limiter.charge(bytes);
        }
    }

    /// Serves one request; `None` when it was handed over.
    fn serve(
        &mut self,
        mut request: Request<'_>,
        head: u16,
        alone: bool,
        mem: &GuestMemoryMmap,
    ) -> Option<Outcome> {
        let refused = Err(request::Refusal::Unsupported);
        let op = match std::mem::replace(&mut request.op, refused) {
            Ok(op) => op,
            Err(refusal) => {
                self.charge(0);
                return Some(request.finish(Err(refusal), &self.state));
            }
        };
        let small = request.data.len() <= AT_ONCE_BYTES;
        match op {
            Op::Read { offset } => {
                self.charge(request.data.len() as u64);
                if small && self.tells_cached {
                    match self.backing.read_cached(request.data.clone(), offset) {
                        Err(BackingError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
                        Err(BackingError::Io(e)) if unsupported(&e) => self.tells_cached = false,
                        other => {
                            let done = other.map(|()| request.data.len());
                            return Some(request.finish(done.map_err(Into::into), &self.state));
                        }
                    }
                }
                if small && alone && !self.tells_cached {
                    return Some(request.execute(&op, &self.backing, &self.state));
                }
            }
            Op::Write { .. } => {
                self.charge(request.data.len() as u64);
                if small && alone {
                    return Some(request.execute(&op, &self.backing, &self.state));
                }
            }
            Op::Identify => {
                self.charge(0);
                return Some(request.execute(&op, &self.backing, &self.state));
            }
            Op::Flush => self.charge(0),
            // What it costs the host is not known: as much as to write it.
            Op::Clear(ref ranges) => self.charge(ranges.iter().map(Range::bytes).sum()),
        }
        // Always so: the request was made of this memory.
        let request = request.into_owned(op, mem)?;
        self.flight
            .launch(head, request, self.backing.clone(), &self.state);
        None
    }

    fn land_requests(&mut self, io: &mut Io<'_>) -> io::Result<()> {
        for (head, outcome) in self.flight.land() {
            if io.queues[QUEUE].ready() {
                use_chain(head, outcome, io)?;
            }
        }
        self.take_requests(io)
    }
}

/// Gives a chain back to the driver; an error when the disk can not go on.
fn use_chain(head: u16, outcome: Outcome, io: &mut Io<'_>) -> io::Result<()> {
    io.give_back(QUEUE, head, outcome.written)?;
    io.notify(QUEUE)?;
    match outcome.failure {
        Some(failure) => Err(io::Error::other(failure)),
        None => Ok(()),
    }
}

fn unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

impl Device for Blk {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_DISCARD
            | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn set_features(&mut self, features: u64) {
        self.state.features = features;
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn start(&mut self, poller: Poller) -> io::Result<()> {
        poller.add(self.flight.event(), LANDED, EpollFlags::EPOLLIN)?;
        if let Some(throttle) = &self.throttle {
            poller.add(&throttle.timer, TIMER, EpollFlags::EPOLLIN)?;
        }
        Ok(())
    }

    fn kicked(&mut self, _: usize, io: &mut Io<'_>) -> io::Result<()> {
        self.take_requests(io)
    }

    fn host_ready(&mut self, token: u32, _: EpollFlags, io: &mut Io<'_>) -> io::Result<()> {
        if token == LANDED {
            return self.land_requests(io);
        }
        if let Some(throttle) = &self.throttle {
            throttle.timer.unset()?;
        }
        self.take_requests(io)
    }

    /// Waits for requests under way: the guest gets its memory back.
    fn reset(&mut self) {
        self.flight.abandon();
        self.state.features = 0;
    }
}

#[cfg(test)]
mod tests;
