//! Word from the event loops to the supervisor.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vmm_client::protocol::Reply;

use super::clients::ClientId;
use crate::machine::Ending;

#[derive(Debug)]
pub enum Notice {
    /// The agent has connected to its ready port.
    GuestReady,
    /// The guest has ended, or a device or its driver failed beyond repair:
    /// how, in words.
    Ended(Ending),
    /// A request was carried out inside a loop.
    Answer(ClientId, Reply),
}

/// Sends notices and wakes the supervisor.
#[derive(Clone)]
pub struct Notifier {
    sender: Sender<Notice>,
    wake: Arc<EventFd>,
}

impl Notifier {
    pub fn send(&self, notice: Notice) {
        // Neither can fail while the supervisor lives, and the process does
        // not outlive it.
        if self.sender.send(notice).is_ok()
            && let Err(error) = self.wake.write(1)
        {
            tracing::error!(%error, "the supervisor cannot be woken");
        }
    }
}

/// The supervisor's end.
pub struct Notices {
    receiver: Receiver<Notice>,
    pub(super) wake: Arc<EventFd>,
}

impl Notices {
    pub(super) fn take(&self) -> Option<Notice> {
        self.receiver.try_recv().ok()
    }
}

pub fn notices() -> io::Result<(Notifier, Notices)> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let wake = Arc::new(EventFd::from_flags(flags)?);
    let (sender, receiver) = channel();
    let notifier = Notifier {
        sender,
        wake: wake.clone(),
    };
    Ok((notifier, Notices { receiver, wake }))
}
