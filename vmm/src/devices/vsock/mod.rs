//! virtio-vsock (virtio 1.2 §5.10): stream connections between guest ports and
//! unix sockets of the host.
//!
//! - The host connects to the pod's listening socket, writes
//!   `CONNECT <port>\n`, reads `OK <host port>\n`; then the bytes are the
//!   guest's. A port that refuses closes the socket.
//! - The guest connects to CID 2; what answers on a port is a [`HostPorts`].
//!
//! Nothing of a connection is lost: bytes that the guest was given credit for
//! reach the socket before it is closed, and the end of a direction comes
//! after its bytes. What is held is bounded: connections, bytes of each, and
//! resets to send.

mod backlog;
mod connection;
mod greeting;
mod guest;
mod host;
mod packet;
mod rx;
mod table;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::epoll::EpollFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::again::Again;
use super::{Device, Io, Poller};
use packet::Ports;
use table::Table;

const RX: usize = 0;
const TX: usize = 1;

/// rx, tx, event (virtio 1.2 §5.10.2). Linux keeps the receive queue filled
/// with 4 KiB buffers, so its size is guest memory: 512 KiB.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// Open at once, in either direction.
const MAX_CONNECTIONS: usize = 4096;

/// Clients that have not said their port yet; the oldest has to go then.
const MAX_GREETINGS: usize = 128;

/// Clients taken from the listener in one event.
const ACCEPTS_PER_EVENT: usize = 64;

/// Resets waiting for the guest to have a buffer. One that is lost costs a
/// guest that floods us a time-out.
const MAX_RESETS: usize = 4096;

/// Packets of the guest handled before the host's side has its turn.
const PACKETS_PER_TURN: usize = 64;

/// Bytes of each connection held for a slow host client: this many while
/// connections are few, fewer for those beyond.
const FEW_CONNECTIONS: usize = 64;
const BUFFER_FEW: u32 = 256 * 1024;
const BUFFER_MANY: u32 = 32 * 1024;

const TOKEN_LISTENER: u32 = 0;
const TOKEN_AGAIN: u32 = 1;
const TOKEN_CONNECTIONS: u32 = 2;

/// What the guest reaches on the host (CID 2).
pub trait HostPorts: Send {
    /// The host's end of a new connection to `port`. An error refuses it.
    fn connect(&mut self, port: u32) -> io::Result<UnixStream>;
}

/// A reset to send for a connection that is none.
struct Reset {
    ports: Ports,
    kind: u16,
}

/// What the guest can see of the device. Connections are not part of it: they
/// are the host's as well, and a guest that is restored is told that they have
/// gone (virtio 1.2 §5.10.6.7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The driver's choice of features.
    pub features: u64,
    pub guest_cid: u64,
}

pub struct Vsock {
    state: State,
    listener: UnixListener,
    listening: bool,
    accept_failing: bool,
    ports: Box<dyn HostPorts>,
    poller: Option<Poller>,
    again: Again,
    table: Table,
    greetings: usize,
    greeting_serial: u64,
    resets: VecDeque<Reset>,
    resets_lost: bool,
}

impl Vsock {
    /// `listener` takes the host's clients; the guest's address is `guest_cid`
    /// (3 or more).
    pub fn new(
        guest_cid: u32,
        listener: UnixListener,
        ports: Box<dyn HostPorts>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            state: State {
                features: 0,
                guest_cid: guest_cid.into(),
            },
            listener,
            listening: false,
            accept_failing: false,
            ports,
            poller: None,
            again: Again::new()?,
            table: Table::new(),
            greetings: 0,
            greeting_serial: 0,
            resets: VecDeque::new(),
            resets_lost: false,
        })
    }

    pub fn state(&self) -> State {
        self.state.clone()
    }

    fn buffer_for_new(&self) -> u32 {
        if self.table.len() < FEW_CONNECTIONS {
            BUFFER_FEW
        } else {
            BUFFER_MANY
        }
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn set_features(&mut self, features: u64) {
        self.state.features = features;
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        super::read_config_bytes(&self.state.guest_cid.to_le_bytes(), offset, data);
    }

    fn start(&mut self, poller: Poller) -> io::Result<()> {
        self.again.watch(&poller, TOKEN_AGAIN)?;
        self.poller = Some(poller);
        self.listen(true)
    }

    fn kicked(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()> {
        if self.accept_failing {
            self.listen(true)?;
        }
        if index == TX {
            self.receive_packets(io)?;
        }
        self.send_pending(io)
    }

    fn host_ready(&mut self, token: u32, flags: EpollFlags, io: &mut Io<'_>) -> io::Result<()> {
        match token {
            TOKEN_LISTENER => self.accept()?,
            TOKEN_AGAIN => {
                self.again.take()?;
                self.receive_packets(io)?;
            }
            _ => self.connection_ready((token - TOKEN_CONNECTIONS) as usize, flags)?,
        }
        self.send_pending(io)
    }

    fn reset(&mut self) {
        self.state.features = 0;
        self.resets.clear();
        for slot in self.table.slots_known_to_guest() {
            if let Err(e) = self.retire(slot) {
                tracing::warn!(error = %e, "vsock: a reset could not close a connection");
            }
        }
    }
}
