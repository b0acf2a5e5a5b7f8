//! One connection: a unix stream socket on the host's side, two ports and
//! credit on the guest's (virtio 1.2 §5.10.6.3).
//!
//! ```text
//! host client ── Greeting ──CONNECT──▶ Connecting ──RESPONSE──▶ Open ──▶ gone
//! guest REQUEST ─────────────────────────────────────────────▶ Open ──▶ gone
//!                                        guest's RST, bytes left ──▶ Draining
//! ```
//!
//! Bytes of the guest that the socket does not take at once wait in the
//! backlog, which credit keeps within `buf_alloc`. Bytes of the host wait in
//! the socket until the guest has credit and a buffer for them.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use nix::sys::epoll::EpollFlags;

use super::backlog::Backlog;
use super::greeting::Greeting;
use super::packet::{Header, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::rx::Rx;
use crate::devices::iov::Iov;

/// Buffers of the guest (4 KiB each, from Linux) that one read fills at most.
const MAX_GATHERED: usize = 32;

/// Bytes one connection may send before the next one has its turn.
const TURN_BYTES: usize = 256 * 1024;

#[derive(Debug)]
pub(super) enum Phase {
    /// The host client has yet to say which port it wants.
    Greeting(Greeting),
    /// The guest has yet to answer our REQUEST.
    Connecting,
    Open,
    /// The guest is done with it; the backlog has yet to reach the host.
    Draining,
}

/// What the guest has yet to be told, apart from data and SHUTDOWN.
#[derive(Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Nothing more to do until something happens.
    Done,
    /// The guest has no receive buffer left.
    Starved,
}

/// The guest sent more than its credit allows.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CreditExceeded;

pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) phase: Phase,
    pub(super) ports: Ports,
    /// In the device's list of connections with something to send.
    pub(super) queued: bool,
    /// What epoll watches, `None` when the socket is not in it.
    pub(super) watched: Option<EpollFlags>,
    owed: Owed,

    // Guest to host.
    backlog: Backlog,
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    /// The count of forwarded bytes that the guest knows of.
    told_forwarded: u32,
    guest_done_sending: bool,
    guest_done_receiving: bool,
    /// The end of the guest's bytes was passed on.
    end_forwarded: bool,
    /// The host takes no more bytes.
    sink_closed: bool,

    // Host to guest.
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// The socket may hold bytes for the guest.
    readable: bool,
    /// The host sends no more bytes.
    source_ended: bool,
    credit_requested: bool,
    told_shutdown: u32,
}

impl Connection {
    fn new(stream: UnixStream, phase: Phase, ports: Ports, buf_alloc: u32) -> Self {
        Self {
            stream,
            phase,
            ports,
            queued: false,
            watched: None,
            owed: Owed::default(),
            backlog: Backlog::default(),
            buf_alloc,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            guest_done_sending: false,
            guest_done_receiving: false,
            end_forwarded: false,
            sink_closed: false,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            readable: false,
            source_ended: false,
            credit_requested: false,
            told_shutdown: 0,
        }
    }

    /// A client that the listener accepted.
    pub(super) fn from_host(stream: UnixStream, greeting: Greeting, buf_alloc: u32) -> Self {
        let ports = Ports { host: 0, guest: 0 };
        Self::new(stream, Phase::Greeting(greeting), ports, buf_alloc)
    }

    /// The guest's REQUEST, accepted.
    pub(super) fn from_guest(stream: UnixStream, ports: Ports, buf_alloc: u32) -> Self {
        let mut new = Self::new(stream, Phase::Open, ports, buf_alloc);
        new.owed.response = true;
        new
    }

    /// The client said where to.
    pub(super) fn request(&mut self, ports: Ports) {
        self.ports = ports;
        self.phase = Phase::Connecting;
        self.owed.request = true;
    }

    /// The guest accepted. An error means the client is gone.
    pub(super) fn accepted(&mut self) -> io::Result<()> {
        self.phase = Phase::Open;
        // The socket's buffer is empty: a short line fits whole or the client
        // is gone.
        let line = format!("OK {}\n", self.ports.host);
        let sent = super::backlog::send(&self.stream, line.as_bytes())?;
        if sent != line.len() {
            return Err(ErrorKind::WriteZero.into());
        }
        self.readable = true;
        Ok(())
    }

    /// The guest has never heard of this connection.
    pub(super) fn unknown_to_guest(&self) -> bool {
        match self.phase {
            Phase::Greeting(_) => true,
            Phase::Connecting => self.owed.request,
            Phase::Open | Phase::Draining => false,
        }
    }

    /// Takes the credit fields that every packet of the guest carries.
    pub(super) fn update_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
            self.owed.credit_request = false;
        }
    }

    pub(super) fn credit_update_requested(&mut self) {
        self.owed.credit_update = true;
    }

    /// Bytes the guest is ready to take. A guest that claims to have taken
    /// more than it was sent only stalls itself.
    fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// Takes a payload of the guest: into the socket as far as it goes, the
    /// rest into the backlog.
    pub(super) fn take_payload(&mut self, payload: &Iov<'_>) -> Result<(), CreditExceeded> {
        let Ok(len) = u32::try_from(payload.len()) else {
            return Err(CreditExceeded);
        };
        let held = self.received.wrapping_sub(self.forwarded);
        if self.guest_done_sending || len > self.buf_alloc - held {
            return Err(CreditExceeded);
        }
        self.received = self.received.wrapping_add(len);
        if !self.sink_closed && len > 0 {
            let mut sent = 0;
            if self.backlog.is_empty() {
                match payload.send(&self.stream) {
                    Ok(n) => sent = n,
                    Err(e) if is_retry(&e) => {}
                    Err(_) => self.close_sink(),
                }
            }
            if !self.sink_closed {
                self.backlog.append(payload, sent);
            }
        }
        self.count_forwarded();
        Ok(())
    }

    /// Moves what waits in the backlog to the socket.
    pub(super) fn flush_backlog(&mut self) {
        if !self.backlog.is_empty() && self.backlog.flush(&self.stream).is_err() {
            self.close_sink();
        }
        self.count_forwarded();
        self.forward_end();
    }

    pub(super) fn backlog_is_empty(&self) -> bool {
        self.backlog.is_empty()
    }

    fn close_sink(&mut self) {
        self.sink_closed = true;
        self.backlog.clear();
    }

    fn count_forwarded(&mut self) {
        // The backlog is within buf_alloc, hence within 32 bits.
        let held = u32::try_from(self.backlog.len()).unwrap_or(u32::MAX);
        self.forwarded = self.received.wrapping_sub(held);
        let unknown = self.forwarded.wrapping_sub(self.told_forwarded);
        // A guest that sees half of the buffer in use is told before it stops.
        if self.received.wrapping_sub(self.told_forwarded) > self.buf_alloc / 2 && unknown > 0 {
            self.owed.credit_update = true;
        }
    }

    fn forward_end(&mut self) {
        if self.guest_done_sending && self.backlog.is_empty() && !self.end_forwarded {
            self.end_forwarded = true;
            // It fails only where the client is gone, which HUP tells.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// The guest's SHUTDOWN; its flags only ever add up.
    pub(super) fn guest_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_done_sending = true;
            self.forward_end();
        }
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_done_receiving {
            self.guest_done_receiving = true;
            self.source_ended = true;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    /// Both directions ended by the guest and everything delivered: it waits
    /// for a RST.
    pub(super) fn is_finished(&self) -> bool {
        self.guest_done_sending && self.guest_done_receiving && self.backlog.is_empty()
    }

    pub(super) fn mark_readable(&mut self) {
        self.readable = true;
    }

    /// The host closed both directions. Until its bytes are read this means
    /// nothing, as they go first.
    pub(super) fn host_hung_up(&mut self) {
        if self.source_ended {
            self.close_sink();
            self.count_forwarded();
        }
    }

    fn shutdown_flags(&self) -> u32 {
        let mut flags = 0;
        if self.source_ended {
            flags |= SHUTDOWN_SEND;
        }
        if self.sink_closed {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags
    }

    /// Something is to be sent to the guest, now.
    pub(super) fn wants_rx(&self) -> bool {
        match self.phase {
            Phase::Greeting(_) | Phase::Draining => false,
            Phase::Connecting => self.owed.request,
            Phase::Open => {
                self.owed.response
                    || self.owed.credit_update
                    || self.owed.credit_request
                    || self.shutdown_flags() != self.told_shutdown
                    || (self.readable && !self.source_ended && self.credit() > 0)
            }
        }
    }

    /// What epoll should watch. Level-triggered: only what can be acted on
    /// now, and HUP, which cannot be masked, only where it is news.
    pub(super) fn interest(&self) -> Option<EpollFlags> {
        let mut flags = EpollFlags::empty();
        match self.phase {
            Phase::Greeting(_) => return Some(EpollFlags::EPOLLIN),
            // Only to learn that the client has gone.
            Phase::Connecting => return Some(flags),
            Phase::Open => {
                // With `readable` set, bytes wait for credit or for a buffer.
                if !self.source_ended && !self.readable {
                    flags |= EpollFlags::EPOLLIN;
                }
            }
            Phase::Draining => {}
        }
        if !self.backlog.is_empty() {
            flags |= EpollFlags::EPOLLOUT;
        }
        let hangup_is_news = self.source_ended && !self.sink_closed;
        (!flags.is_empty() || hangup_is_news).then_some(flags)
    }

    /// Sends what the guest is owed, then data for one turn.
    pub(super) fn pump(&mut self, rx: &mut Rx<'_>) -> io::Result<Pumped> {
        if self.owed.request {
            if !self.send(rx, op::REQUEST, 0)? {
                return Ok(Pumped::Starved);
            }
            self.owed.request = false;
        }
        if !matches!(self.phase, Phase::Open) {
            return Ok(Pumped::Done);
        }
        if self.owed.response {
            if !self.send(rx, op::RESPONSE, 0)? {
                return Ok(Pumped::Starved);
            }
            self.owed.response = false;
        }
        if self.pump_data(rx)? == Pumped::Starved {
            return Ok(Pumped::Starved);
        }
        // Data carries the counters: an update may have become needless.
        if self.owed.credit_update {
            if !self.send(rx, op::CREDIT_UPDATE, 0)? {
                return Ok(Pumped::Starved);
            }
            self.owed.credit_update = false;
        }
        if self.owed.credit_request {
            if !self.send(rx, op::CREDIT_REQUEST, 0)? {
                return Ok(Pumped::Starved);
            }
            self.owed.credit_request = false;
        }
        let flags = self.shutdown_flags();
        if flags != self.told_shutdown {
            if !self.send(rx, op::SHUTDOWN, flags)? {
                return Ok(Pumped::Starved);
            }
            self.told_shutdown = flags;
        }
        Ok(Pumped::Done)
    }

    fn pump_data(&mut self, rx: &mut Rx<'_>) -> io::Result<Pumped> {
        let mut turn = TURN_BYTES;
        // Few bytes wait most of the time: more buffers once one was filled.
        let mut gathered = 1;
        let mut reset_seen = false;
        while self.readable && !self.source_ended {
            let credit = self.credit();
            if credit == 0 {
                // Asked once; the guest answers when it has room again.
                if !self.credit_requested {
                    self.credit_requested = true;
                    self.owed.credit_request = true;
                }
                break;
            }
            if turn == 0 {
                // More may wait; the socket says so to epoll.
                self.readable = false;
                break;
            }
            let Some(batch) = rx.gather(gathered, credit.min(turn))? else {
                return Ok(Pumped::Starved);
            };
            gathered = MAX_GATHERED;
            let header = self.header(op::RW, 0);
            let room = batch.room.len();
            let received = batch.room.receive(&self.stream);
            let count = received.as_ref().map_or(0, |&count| count);
            rx.put_batch(batch, count, self.ports, header)?;
            match received {
                Ok(0) => self.source_ended = true,
                Ok(count) => {
                    let len = u32::try_from(count).map_err(io::Error::other)?;
                    self.sent = self.sent.wrapping_add(len);
                    self.told(&header);
                    turn -= count.min(turn);
                    // A short read emptied the socket, most likely; if not,
                    // epoll says so.
                    self.readable = count == room;
                }
                Err(e) => {
                    if is_retry(&e) {
                        self.readable = false;
                    } else if e.kind() == ErrorKind::ConnectionReset && !reset_seen {
                        // The client closed without reading all it was sent.
                        // Said once; what it had sent can still be read.
                        reset_seen = true;
                    } else {
                        self.source_ended = true;
                    }
                }
            }
        }
        Ok(Pumped::Done)
    }

    fn header(&self, op: u16, flags: u32) -> Header {
        Header {
            op,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }

    fn send(&mut self, rx: &mut Rx<'_>, op: u16, flags: u32) -> io::Result<bool> {
        let header = self.header(op, flags);
        let sent = rx.send(self.ports, header)?;
        if sent {
            self.told(&header);
        }
        Ok(sent)
    }

    fn told(&mut self, header: &Header) {
        self.told_forwarded = header.fwd_cnt;
        self.owed.credit_update = false;
    }
}

pub(super) fn is_retry(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
