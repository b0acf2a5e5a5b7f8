//! What all devices do with their queues.

use std::io;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::Io;

/// A chain that the driver made available.
pub(crate) type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// Takes the next chain. Without one the driver is asked for a kick when it
/// has more.
pub(crate) fn next_chain<'m>(
    queue: &mut Queue,
    mem: &'m GuestMemoryMmap,
) -> io::Result<Option<Chain<'m>>> {
    let next = queue.iter(mem).map_err(broken)?.next();
    // One may come between the look and the asking.
    if next.is_none() && queue.enable_notification(mem).map_err(broken)? {
        return Ok(queue.iter(mem).map_err(broken)?.next());
    }
    Ok(next)
}

impl<'a> Io<'a> {
    /// As [`next_chain`], of queue `index`.
    pub(crate) fn next_chain(&mut self, index: usize) -> io::Result<Option<Chain<'a>>> {
        next_chain(&mut self.queues[index], self.mem)
    }

    /// Gives the chain that begins with `head` back to the driver, with
    /// `written` bytes in it.
    pub(crate) fn give_back(&mut self, index: usize, head: u16, written: u32) -> io::Result<()> {
        self.queues[index]
            .add_used(self.mem, head, written)
            .map_err(broken)
    }

    /// Interrupts the driver if it wants to know of chains given back.
    pub(crate) fn notify(&mut self, index: usize) -> io::Result<()> {
        if self.queues[index]
            .needs_notification(self.mem)
            .map_err(broken)?
        {
            self.irq.queue_used(index);
        }
        Ok(())
    }

    /// As [`Io::notify`], of what was given back since queue `index` was at
    /// `before`, its `next_used` of then. Of nothing it tells nothing: a
    /// driver without EVENT_IDX is interrupted whenever it is told.
    pub(crate) fn notify_since(&mut self, index: usize, before: u16) -> io::Result<()> {
        if self.queues[index].next_used() == before {
            return Ok(());
        }
        self.notify(index)
    }
}

/// A ring that cannot be worked with: nothing on it can be believed any more.
pub(crate) fn broken(e: virtio_queue::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}
