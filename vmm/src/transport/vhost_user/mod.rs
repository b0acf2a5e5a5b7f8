//! vhost-user, as User Mode Linux speaks it: UML's `virtio_uml` driver is the
//! front end, one socket a device; its guest memory is a file it sends.
//!
//! ```text
//! Listening ── connect ──▶ Connected ── close ──▶ Closed
//! ```
//! One front end a device for the machine's life: nothing may connect after
//! the guest's kernel has.

mod memory;
#[cfg(test)]
mod tests;
mod wire;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, send};
use virtio_queue::QueueT;

pub use memory::Memory;

use self::wire::{Connection, MAX_CONFIG, Message, Next, config_change};
use super::{Slot, Transport, invalid, place_rings};
use crate::devices::{Interrupt, Poller};

/// VHOST_USER_F_PROTOCOL_FEATURES.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol features BACKEND_REQ (config changes) and CONFIG.
const PROTOCOL_FEATURES: u64 = 1 << 5 | 1 << 9;

/// MAX_SUPPORTED_QUEUE_SIZE of `virtio_uml`.
const UML_QUEUE_SIZE: u16 = 256;

const LISTENER: u32 = 0;
const CONNECTION: u32 = 1;

pub struct VhostUser {
    state: State,
    poller: Option<Poller>,
    memory: Arc<Memory>,
    lines: Arc<Lines>,
    /// The front end says when a queue is enabled. One that did not take
    /// VHOST_USER_F_PROTOCOL_FEATURES does not: there a queue is, once it has
    /// its kick. `virtio_uml` loses that bit for a driver that changes its
    /// mind about features, as the balloon's does.
    enables: bool,
}

enum State {
    Listening(UnixListener),
    Connected(Connection),
    Closed,
}

impl VhostUser {
    /// Listens for the front end of one device at `path`.
    pub fn listen(path: &Path, memory: Arc<Memory>) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            state: State::Listening(listener),
            poller: None,
            memory,
            lines: Arc::new(Lines::default()),
            enables: false,
        })
    }

    fn accept(&mut self) -> io::Result<()> {
        let State::Listening(listener) = &self.state else {
            return Ok(());
        };
        let (socket, _) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        };
        let connection = Connection::new(socket)?;
        let poller = self.poller.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        poller.remove(listener)?;
        poller.add(&connection, CONNECTION, EpollFlags::EPOLLIN)?;
        self.state = State::Connected(connection);
        Ok(())
    }

    fn handle(&mut self, message: Message, slot: &mut Slot) -> io::Result<()> {
        let State::Connected(connection) = &self.state else {
            return Ok(());
        };
        match message {
            Message::SetOwner | Message::SetVringErr => {}
            Message::GetFeatures => {
                connection.reply_u64(1, slot.device().features() | F_PROTOCOL_FEATURES)?;
            }
            Message::SetFeatures(features) => {
                let offered = slot.device().features() | F_PROTOCOL_FEATURES;
                if features & !offered != 0 {
                    return Err(invalid(format!(
                        "features {:#x} were not offered",
                        features & !offered
                    )));
                }
                self.enables = features & F_PROTOCOL_FEATURES != 0;
                slot.set_features(features & !F_PROTOCOL_FEATURES);
            }
            Message::GetProtocolFeatures => connection.reply_u64(15, PROTOCOL_FEATURES)?,
            Message::SetProtocolFeatures(features) => {
                if features & !PROTOCOL_FEATURES != 0 {
                    return Err(invalid("protocol features were not offered"));
                }
            }
            Message::SetBackendReqFd(fd) => self.lines.lock().requests = Some(fd),
            Message::SetMemTable(table) => slot.set_memory(self.memory.map(table)?),
            Message::SetVringNum(vring) => {
                let queue = slot.queue(vring.index)?;
                let size = u16::try_from(vring.num).unwrap_or(u16::MAX);
                if !size.is_power_of_two() || size > queue.max_size() {
                    return Err(invalid(format!("a queue of {} descriptors", vring.num)));
                }
                queue.set_size(size);
            }
            Message::SetVringBase(vring) => {
                let base = u16::try_from(vring.num).map_err(|_| invalid("ring base"))?;
                let queue = slot.queue(vring.index)?;
                queue.set_next_avail(base);
                queue.set_next_used(base);
            }
            Message::SetVringAddr(addr) => {
                let queue = slot.queue(addr.index)?;
                place_rings(queue, [addr.desc, addr.avail, addr.used]);
            }
            Message::SetVringKick(index, fd) => {
                let fd = fd.map(nonblocking).transpose()?;
                let started = fd.is_some() && !self.enables;
                slot.set_kick(index, fd.map(Arc::new))?;
                if started {
                    slot.enable(index, true)?;
                    slot.kicked(index)?;
                }
            }
            Message::SetVringCall(index, fd) => {
                slot.queue(index)?;
                let mut lines = self.lines.lock();
                if lines.calls.len() <= index {
                    lines.calls.resize_with(index + 1, || None);
                }
                lines.calls[index] = fd;
            }
            Message::SetVringEnable(vring) => {
                slot.enable(vring.index, vring.num != 0)?;
                slot.kicked(vring.index)?;
            }
            Message::GetConfig {
                offset,
                size,
                flags,
            } => {
                let mut data = vec![0; (size as usize).min(MAX_CONFIG)];
                slot.device().read_config(offset as usize, &mut data);
                connection.reply_config(offset, flags, &data)?;
            }
            Message::SetConfig { offset, data } => {
                slot.device_mut().write_config(offset as usize, &data);
            }
        }
        Ok(())
    }
}

impl Transport for VhostUser {
    fn interrupt(&self) -> Arc<dyn Interrupt> {
        self.lines.clone()
    }

    fn queue_size(&self, wanted: u16) -> u16 {
        // The front end never asks: `virtio_uml` makes every queue this big.
        wanted.max(UML_QUEUE_SIZE)
    }

    fn start(&mut self, poller: Poller) -> io::Result<()> {
        if let State::Listening(listener) = &self.state {
            poller.add(listener, LISTENER, EpollFlags::EPOLLIN)?;
        }
        self.poller = Some(poller);
        Ok(())
    }

    fn ready(&mut self, token: u32, slot: &mut Slot) -> io::Result<()> {
        if token == LISTENER {
            return self.accept();
        }
        loop {
            let State::Connected(connection) = &mut self.state else {
                return Ok(());
            };
            match connection.next()? {
                Next::Nothing => return Ok(()),
                Next::Message(message) => self.handle(message, slot)?,
                Next::Closed => {
                    // Closing also takes it out of the epoll set.
                    self.state = State::Closed;
                    *self.lines.lock() = Ends::default();
                    return slot.reset();
                }
            }
        }
    }
}

/// The guest's ends of interrupt lines.
#[derive(Default)]
struct Lines(Mutex<Ends>);

#[derive(Default)]
struct Ends {
    /// One stream socket a queue (UML cannot take a signal from an eventfd).
    calls: Vec<Option<OwnedFd>>,
    /// Takes the back end's own requests.
    requests: Option<OwnedFd>,
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interrupt for Lines {
    fn queue_used(&self, index: usize) {
        if let Some(Some(call)) = self.lock().calls.get(index) {
            notify(call, &1u64.to_ne_bytes());
        }
    }

    fn config_changed(&self) {
        if let Some(requests) = &self.lock().requests
            && let Ok(message) = config_change()
        {
            notify(requests, &message);
        }
    }
}

/// Sends to a line. A full one holds notices that the guest has not taken
/// yet, so one more would tell it nothing; a closed one has no guest.
fn notify(line: &OwnedFd, message: &[u8]) {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match send(line.as_raw_fd(), message, flags) {
        Ok(_) | Err(Errno::EAGAIN | Errno::EPIPE | Errno::ECONNRESET) => {}
        Err(error) => tracing::debug!(%error, "interrupt line"),
    }
}

/// The descriptor is shared with the guest's kernel, which only writes to it.
fn nonblocking(fd: OwnedFd) -> io::Result<File> {
    let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(File::from(fd))
}
