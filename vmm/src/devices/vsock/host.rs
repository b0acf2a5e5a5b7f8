//! The device's host side: the listener, its clients, and the sockets of
//! connections.

use std::io::{self, ErrorKind};

use nix::sys::epoll::EpollFlags;

use super::connection::{Connection, Phase};
use super::greeting::{Greeted, Greeting};
use super::packet::TYPE_STREAM;
use super::{
    ACCEPTS_PER_EVENT, MAX_CONNECTIONS, MAX_GREETINGS, TOKEN_CONNECTIONS, TOKEN_LISTENER, Vsock,
};

impl Vsock {
    pub(super) fn listen(&mut self, on: bool) -> io::Result<()> {
        let Some(poller) = &self.poller else {
            return Ok(());
        };
        if on != self.listening {
            if on {
                poller.add(&self.listener, TOKEN_LISTENER, EpollFlags::EPOLLIN)?;
            } else {
                poller.remove(&self.listener)?;
            }
            self.listening = on;
        }
        Ok(())
    }

    pub(super) fn accept(&mut self) -> io::Result<()> {
        for _ in 0..ACCEPTS_PER_EVENT {
            if self.table.len() >= MAX_CONNECTIONS {
                // Clients wait in the listener's backlog until one has gone.
                return self.listen(false);
            }
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => {
                    // Out of descriptors or memory. Tried again when a
                    // connection closes or the guest stirs.
                    if !self.accept_failing {
                        self.accept_failing = true;
                        tracing::warn!(error = %e, "vsock: a client cannot be accepted now");
                    }
                    return self.listen(false);
                }
            };
            self.accept_failing = false;
            if self.greetings >= MAX_GREETINGS
                && let Some(oldest) = self.table.oldest_greeting()
            {
                self.remove(oldest)?;
            }
            let greeting = Greeting::new(self.greeting_serial);
            self.greeting_serial += 1;
            self.greetings += 1;
            let buffer = self.buffer_for_new();
            let slot = self
                .table
                .insert_unbound(Connection::from_host(stream, greeting, buffer));
            self.watch(slot)?;
        }
        Ok(())
    }

    /// Makes epoll watch for what the connection now waits for. A socket that
    /// cannot be watched is given up.
    pub(super) fn watch(&mut self, slot: usize) -> io::Result<()> {
        let (Some(poller), Some(connection)) = (&self.poller, self.table.get_mut(slot)) else {
            return Ok(());
        };
        let wanted = connection.interest();
        if wanted == connection.watched {
            return Ok(());
        }
        let token = TOKEN_CONNECTIONS + u32::try_from(slot).map_err(io::Error::other)?;
        let result = match (connection.watched, wanted) {
            (None, Some(flags)) => poller.add(&connection.stream, token, flags),
            (Some(_), Some(flags)) => poller.modify(&connection.stream, token, flags),
            (Some(_), None) => poller.remove(&connection.stream),
            (None, None) => Ok(()),
        };
        connection.watched = wanted;
        if let Err(e) = result {
            tracing::warn!(error = %e, "vsock: a connection cannot be watched");
            if !connection.unknown_to_guest() && !matches!(connection.phase, Phase::Draining) {
                let ports = connection.ports;
                self.reset_peer(ports, TYPE_STREAM);
            }
            return self.remove(slot);
        }
        Ok(())
    }

    /// Closes the host's socket and forgets the connection.
    pub(super) fn remove(&mut self, slot: usize) -> io::Result<()> {
        let connection = self.table.remove(slot);
        if matches!(connection.phase, Phase::Greeting(_)) {
            self.greetings -= 1;
        }
        self.listen(true)
    }

    /// Ends a connection that the guest has no more to do with; bytes taken
    /// from the guest still go to the host, when the loop finds that they can:
    /// this may be a processor's thread, which writes to no socket.
    pub(super) fn retire(&mut self, slot: usize) -> io::Result<()> {
        if self.table[slot].backlog_is_empty() {
            return self.remove(slot);
        }
        self.table.start_draining(slot);
        self.watch(slot)
    }

    pub(super) fn connection_ready(&mut self, slot: usize, flags: EpollFlags) -> io::Result<()> {
        // An event of the same round may have ended it.
        let Some(connection) = self.table.get_mut(slot) else {
            return Ok(());
        };
        let hung_up = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        match &mut connection.phase {
            Phase::Greeting(greeting) => match greeting.read(&connection.stream) {
                Greeted::NotYet => return Ok(()),
                Greeted::Refuse => return self.remove(slot),
                Greeted::Connect(port) => {
                    self.greetings -= 1;
                    self.table.bind(slot, port);
                }
            },
            Phase::Connecting => {
                if hung_up {
                    let ports = connection.ports;
                    if !connection.unknown_to_guest() {
                        self.reset_peer(ports, TYPE_STREAM);
                    }
                    return self.remove(slot);
                }
            }
            Phase::Open => {
                connection.flush_backlog();
                if flags.contains(EpollFlags::EPOLLIN) {
                    connection.mark_readable();
                }
                if hung_up {
                    connection.host_hung_up();
                }
                self.end_if_finished(slot)?;
            }
            Phase::Draining => {
                connection.flush_backlog();
                if connection.backlog_is_empty() {
                    return self.remove(slot);
                }
            }
        }
        self.table.enqueue(slot);
        self.watch(slot)
    }
}
