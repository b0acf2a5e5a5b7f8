//! One pair of queues on one queue of the tap.

use std::io;

use nix::sys::epoll::EpollFlags;
use virtio_queue::QueueT;

use super::outgoing;
use super::rx::{Rx, Stopped};
use super::tap::Tap;
use crate::devices::iov::split;
use crate::devices::queue::broken;
use crate::devices::{Io, Poller};

/// Packets sent before other devices of the loop get their turn.
pub(super) const TX_BUDGET: usize = 64;

/// Watches for the tap's end alone, which comes as EPOLLERR. A tap never has
/// this kind of data, but with an empty set epoll would miss the wake-up.
pub(super) const ITS_END: EpollFlags = EpollFlags::EPOLLPRI;

pub(super) struct Pair {
    pub(super) tap: Tap,
    pub(super) rx: Rx,
    /// Its number among the pairs.
    index: usize,
    /// What epoll watches for; `None` when the tap's queue is not in it.
    watched: Option<EpollFlags>,
}

impl Pair {
    pub(super) fn new(tap: Tap, index: usize) -> Self {
        Self {
            tap,
            rx: Rx::new(),
            index,
            watched: None,
        }
    }

    pub(super) fn rx_queue(&self) -> usize {
        2 * self.index
    }

    pub(super) fn tx_queue(&self) -> usize {
        2 * self.index + 1
    }

    pub(super) fn watch(
        &mut self,
        poller: Option<&Poller>,
        flags: Option<EpollFlags>,
    ) -> io::Result<()> {
        if flags == self.watched {
            return Ok(());
        }
        let poller = poller.ok_or(io::ErrorKind::NotConnected)?;
        let token = u32::try_from(self.index).map_err(io::Error::other)?;
        match (self.watched, flags) {
            (None, Some(flags)) => poller.add(&self.tap, token, flags)?,
            (Some(_), Some(flags)) => poller.modify(&self.tap, token, flags)?,
            (_, None) => poller.remove(&self.tap)?,
        }
        self.watched = flags;
        Ok(())
    }

    /// Packets from the tap to the guest.
    pub(super) fn receive(&mut self, poller: Option<&Poller>, io: &mut Io<'_>) -> io::Result<()> {
        let index = self.rx_queue();
        let queue = &mut io.queues[index];
        if !queue.ready() {
            return self.watch(poller, Some(ITS_END));
        }
        let before = queue.next_used();
        let stopped = self.rx.run(&self.tap, queue, io.mem)?;
        io.notify_since(index, before)?;
        let flags = match stopped {
            Stopped::Watch => EpollFlags::EPOLLIN,
            Stopped::NoBuffers => ITS_END,
        };
        self.watch(poller, Some(flags))
    }

    /// Packets of the guest to the tap; false when some were left for the
    /// next turn.
    pub(super) fn transmit(&mut self, io: &mut Io<'_>) -> io::Result<bool> {
        let index = self.tx_queue();
        let queue = &mut io.queues[index];
        if !queue.ready() {
            return Ok(true);
        }
        queue.disable_notification(io.mem).map_err(broken)?;
        let before = queue.next_used();
        let mut sent = 0;
        let done = loop {
            if sent == TX_BUDGET {
                break false;
            }
            let Some(chain) = io.next_chain(index)? else {
                break true;
            };
            sent += 1;
            let head = chain.head_index();
            if let Ok((packet, _)) = split(chain, io.mem)
                && let Err(error) = outgoing::send(packet, &self.tap)
            {
                if Tap::is_gone(&error) {
                    return Err(self.tap.gone());
                }
                // As a wire would: what cannot be sent is lost.
                tracing::trace!(%error, "packet dropped");
            }
            io.give_back(index, head, 0)?;
        };
        io.notify_since(index, before)?;
        Ok(done)
    }
}
