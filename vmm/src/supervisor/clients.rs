//! Connections of the control protocol.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{SockFlag, accept4};
use serde::Serialize;
use vmm_client::packet::send;
use vmm_client::protocol::Request;

use super::LISTENER;
use crate::packet;

/// Connections at once; more wait in the listener's backlog. The daemon needs
/// two.
const MAX_CLIENTS: usize = 32;

pub type ClientId = u64;

struct Client {
    socket: OwnedFd,
    /// Takes events only.
    subscribed: bool,
    /// Waits for an answer and is not listened to.
    busy: bool,
}

/// What a client's readiness came to.
pub(super) enum Said {
    Request(Request, Vec<OwnedFd>),
    Nothing,
}

pub(super) struct Clients {
    listener: OwnedFd,
    listening: bool,
    connected: BTreeMap<ClientId, Client>,
    next: ClientId,
}

impl Clients {
    /// The listener's epoll datum is [`LISTENER`]; clients get the numbers
    /// after it.
    pub(super) fn new(listener: OwnedFd, epoll: &Epoll) -> io::Result<Self> {
        let mut clients = Self {
            listener,
            listening: false,
            connected: BTreeMap::new(),
            next: LISTENER + 1,
        };
        clients.listen(true, epoll)?;
        Ok(clients)
    }

    fn listen(&mut self, on: bool, epoll: &Epoll) -> io::Result<()> {
        if on == self.listening {
            return Ok(());
        }
        if on {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, LISTENER);
            epoll.add(&self.listener, event)?;
        } else {
            epoll.delete(&self.listener)?;
        }
        self.listening = on;
        Ok(())
    }

    pub(super) fn accept(&mut self, epoll: &Epoll) -> io::Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = match accept4(self.listener.as_raw_fd(), flags) {
            // SAFETY: the kernel has just made this descriptor and nothing
            // else knows it.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let id = self.next;
        self.next += 1;
        epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, id))?;
        let client = Client {
            socket,
            subscribed: false,
            busy: false,
        };
        self.connected.insert(id, client);
        self.listen(self.connected.len() < MAX_CLIENTS, epoll)
    }

    /// Reads one request of a client, which is busy from then on. One that
    /// has gone or breaks the protocol is dropped.
    pub(super) fn read(&mut self, id: ClientId, epoll: &Epoll) -> io::Result<Said> {
        let Some(client) = self.connected.get_mut(&id) else {
            return Ok(Said::Nothing);
        };
        match packet::recv::<Request>(&client.socket) {
            Ok(Some((request, fds))) if !client.subscribed => {
                client.busy = true;
                epoll.delete(&client.socket)?;
                return Ok(Said::Request(request, fds));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Said::Nothing),
            Ok(Some(_)) => tracing::warn!("a subscriber sent a request"),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "a control connection broke the protocol"),
        }
        self.drop_client(id, epoll)?;
        Ok(Said::Nothing)
    }

    /// Sends a message to a client and listens to it again.
    pub(super) fn answer(
        &mut self,
        id: ClientId,
        message: &impl Serialize,
        epoll: &Epoll,
    ) -> io::Result<()> {
        let Some(client) = self.connected.get_mut(&id) else {
            return Ok(());
        };
        if std::mem::take(&mut client.busy) {
            epoll.add(&client.socket, EpollEvent::new(EpollFlags::EPOLLIN, id))?;
        }
        // One that does not read its answers is as good as gone.
        if send(client.socket.as_fd(), message, &[]).is_err() {
            self.drop_client(id, epoll)?;
        }
        Ok(())
    }

    pub(super) fn subscribe(&mut self, id: ClientId) {
        if let Some(client) = self.connected.get_mut(&id) {
            client.subscribed = true;
        }
    }

    /// Sends an event to all subscribers.
    pub(super) fn broadcast(&mut self, event: &impl Serialize, epoll: &Epoll) -> io::Result<()> {
        let subscribers: Vec<_> = self
            .connected
            .iter()
            .filter(|(_, client)| client.subscribed)
            .map(|(&id, _)| id)
            .collect();
        for id in subscribers {
            self.answer(id, event, epoll)?;
        }
        Ok(())
    }

    fn drop_client(&mut self, id: ClientId, epoll: &Epoll) -> io::Result<()> {
        if let Some(client) = self.connected.remove(&id)
            && !client.busy
        {
            epoll.delete(&client.socket)?;
        }
        self.listen(true, epoll)
    }
}
