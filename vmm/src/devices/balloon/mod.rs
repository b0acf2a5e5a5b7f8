//! Memory balloon (virtio 1.2 §5.5): the guest gives pages it does not use
//! back to the host.
//!
//! - *Inflating*: the host sets a target, the driver takes that many pages out
//!   of the guest's use and names them; deflating is telling only, as a page
//!   comes back when it is touched. A guest about to kill for want of memory
//!   deflates on its own (DEFLATE_ON_OOM).
//! - *Free page reporting*: without a target, the driver names runs of free
//!   pages a while after they became free.
//!
//! Whatever is named is the guest's own memory, so a lie costs only itself.
//! Work is done in turns, so that a guest that names the same pages over and
//! over does not keep other devices of the loop waiting.

mod reclaim;
#[cfg(test)]
mod tests;

use std::io;

use nix::sys::epoll::EpollFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use self::reclaim::{PAGE, give_back};
use super::again::Again;
use super::queue::Chain;
use super::{Device, Io, Poller, iov, read_config_bytes};

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM and VIRTIO_BALLOON_F_REPORTING.
const F_DEFLATE_ON_OOM: u32 = 2;
const F_REPORTING: u32 = 5;

const INFLATE: usize = 0;
const REPORTING: usize = 2;
/// inflateq, deflateq and reporting_vq: queues of features that are not
/// offered (statsq, free_page_vq) take no number. Linux reports only through
/// a queue that holds 32 ranges or more.
const QUEUE_SIZES: [u16; 3] = [128, 128, 32];

/// Chains handled before other events of the loop have their turn.
const CHAINS_PER_TURN: usize = 32;
/// Pages named in one chain of the inflate queue; Linux names 256. More are
/// not given back, which the driver cannot tell.
const PAGES_PER_CHAIN: usize = 4096;
/// Ranges in one chain of the reporting queue; Linux reports 32.
const RANGES_PER_CHAIN: usize = 1024;

const AGAIN: u32 = 0;

/// What the guest can see of the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The driver's choice of features.
    pub features: u64,
    /// Pages of 4 KiB the host wants.
    pub target_pages: u32,
    /// Pages of 4 KiB the driver says it has given.
    pub actual_pages: u32,
}

pub struct Balloon {
    state: State,
    again: Again,
    /// Bytes given back to the host so far.
    reclaimed: u64,
    /// The host took pages back once and refused; said only once.
    refused: bool,
}

impl Balloon {
    /// With a target of `bytes`: see [`Self::set_target`].
    pub fn new(bytes: u64) -> io::Result<Self> {
        Ok(Self {
            state: State {
                target_pages: pages(bytes),
                ..State::default()
            },
            again: Again::new()?,
            reclaimed: 0,
            refused: false,
        })
    }

    /// Asks the guest to do without `bytes` of its memory, rounded down to
    /// pages; it follows as far and as soon as it can.
    pub fn set_target(&mut self, bytes: u64, io: &Io<'_>) {
        let pages = pages(bytes);
        if pages != self.state.target_pages {
            self.state.target_pages = pages;
            io.irq.config_changed();
        }
    }

    /// Bytes that the driver says it has given by inflating.
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.state.actual_pages) * PAGE
    }

    /// Bytes named by the driver in any way and given back to the host; a
    /// page counts each time.
    pub fn reclaimed_bytes(&self) -> u64 {
        self.reclaimed
    }

    pub fn state(&self) -> State {
        self.state.clone()
    }

    fn serve(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()> {
        let mem = io.mem;
        if !io.queues.get(index).is_some_and(QueueT::ready) {
            return Ok(());
        }
        let before = io.queues[index].next_used();
        let mut left = CHAINS_PER_TURN;
        while let Some(chain) = io.next_chain(index)? {
            if left == 0 {
                io.queues[index].go_to_previous_position();
                self.again.ring()?;
                break;
            }
            left -= 1;
            let head = chain.head_index();
            match index {
                INFLATE => self.inflate(chain, mem),
                REPORTING => self.report(chain, mem),
                // Deflating: the pages come back when they are touched.
                _ => {}
            }
            io.give_back(index, head, 0)?;
        }
        io.notify_since(index, before)
    }

    /// Gives back the pages whose numbers a chain holds (le32 each).
    fn inflate(&mut self, chain: Chain<'_>, mem: &GuestMemoryMmap) {
        let Ok((mut list, _)) = iov::split(chain, mem) else {
            return;
        };
        let mut pages = Vec::new();
        while pages.len() < PAGES_PER_CHAIN
            && let Some(number) = list.take_bytes::<4>()
        {
            pages.push(u32::from_le_bytes(number));
        }
        // Neighbours come in any order; each run is one call.
        pages.sort_unstable();
        pages.dedup();
        for run in pages.chunk_by(|a, b| b - a == 1) {
            self.give_back(mem, u64::from(run[0]) * PAGE, run.len() as u64 * PAGE);
        }
    }

    /// Gives back the whole pages in the buffers of a chain.
    fn report(&mut self, chain: Chain<'_>, mem: &GuestMemoryMmap) {
        for range in chain.writable().take(RANGES_PER_CHAIN) {
            let addr = range.addr().0;
            let (Some(start), Some(end)) = (
                addr.checked_next_multiple_of(PAGE),
                addr.checked_add(range.len().into()),
            ) else {
                continue;
            };
            let end = end - end % PAGE;
            if start < end {
                self.give_back(mem, start, end - start);
            }
        }
    }

    fn give_back(&mut self, mem: &GuestMemoryMmap, addr: u64, len: u64) {
        let (given, result) = give_back(mem, GuestAddress(addr), len);
        self.reclaimed = self.reclaimed.saturating_add(given);
        if let Err(error) = result
            && !self.refused
        {
            self.refused = true;
            tracing::warn!(%error, "the host does not take back pages of the guest");
        }
    }
}

fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << F_DEFLATE_ON_OOM
            | 1 << F_REPORTING
    }

    fn set_features(&mut self, features: u64) {
        self.state.features = features;
    }

    /// num_pages and actual (virtio 1.2 §5.5.4).
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.state.target_pages.to_le_bytes());
        config[4..].copy_from_slice(&self.state.actual_pages.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    /// The driver writes `actual`, whole or in parts.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut actual = self.state.actual_pages.to_le_bytes();
        for (index, &byte) in data.iter().enumerate() {
            let at = offset.saturating_add(index).checked_sub(4);
            if let Some(to) = at.and_then(|at| actual.get_mut(at)) {
                *to = byte;
            }
        }
        self.state.actual_pages = u32::from_le_bytes(actual);
    }

    fn start(&mut self, poller: Poller) -> io::Result<()> {
        self.again.watch(&poller, AGAIN)
    }

    fn kicked(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()> {
        self.serve(index, io)
    }

    fn host_ready(&mut self, _: u32, _: EpollFlags, io: &mut Io<'_>) -> io::Result<()> {
        self.again.take()?;
        for index in 0..QUEUE_SIZES.len() {
            self.serve(index, io)?;
        }
        Ok(())
    }

    /// The target is the host's and stays; a new driver starts with an empty
    /// balloon.
    fn reset(&mut self) {
        self.state.features = 0;
        self.state.actual_pages = 0;
    }
}
