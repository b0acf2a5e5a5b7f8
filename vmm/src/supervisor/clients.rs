//! Connections of the control protocol.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

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

/// Between attempts to accept when the process is out of descriptors or
/// memory, which its guest may have brought about: nothing tells when there
/// are some again.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

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
    /// When to try again after an accept has failed.
    retry_at: Option<Instant>,
    /// The last one did, which was said.
    failing: bool,
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
            retry_at: None,
            failing: false,
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
            Err(error) => return self.pause(error, epoll),
        };
        let id = self.next;
        self.next += 1;
        if let Err(error) = epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, id)) {
            // The client sees its connection closed.
            return self.pause(error, epoll);
        }
        self.failing = false;
        let client = Client {
            socket,
            subscribed: false,
            busy: false,
        };
        self.connected.insert(id, client);
        self.listen(self.connected.len() < MAX_CLIENTS, epoll)
    }

    /// Leaves clients in the backlog for a while. The machine runs on.
    fn pause(&mut self, error: Errno, epoll: &Epoll) -> io::Result<()> {
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!(%error, "a control connection cannot be accepted now");
        }
        self.retry_at = Some(Instant::now() + ACCEPT_RETRY);
        self.listen(false, epoll)
    }

    /// How long the supervisor may wait for events.
    pub(super) fn patience(&self) -> Option<Duration> {
        let at = self.retry_at?;
        Some(at.saturating_duration_since(Instant::now()))
    }

    /// Listens again once a pause is over.
    pub(super) fn resume(&mut self, epoll: &Epoll) -> io::Result<()> {
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.retry_at = None;
            self.listen(true, epoll)?;
        }
        Ok(())
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
        let watched = match std::mem::take(&mut client.busy) {
            true => epoll.add(&client.socket, EpollEvent::new(EpollFlags::EPOLLIN, id)),
            false => Ok(()),
        };
        if let Err(error) = watched {
            tracing::warn!(%error, "a control connection cannot be watched; it is closed");
            // It is in no epoll set.
            client.busy = true;
            return self.drop_client(id, epoll);
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
        if self.retry_at.is_none() {
            self.listen(true, epoll)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::epoll::{EpollCreateFlags, EpollTimeout};
    use nix::sys::socket::{
        AddressFamily, Backlog, SockType, UnixAddr, bind, connect, getsockname, listen, socket,
    };

    use super::*;
    use crate::refusing::refuse_to_this_thread;

    fn packets() -> OwnedFd {
        let flags = SockFlag::SOCK_CLOEXEC;
        socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap()
    }

    #[test]
    fn a_client_that_cannot_be_accepted_waits_and_ends_nothing() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let listener = packets();
        bind(listener.as_raw_fd(), &UnixAddr::new_unnamed()).unwrap();
        listen(&listener, Backlog::new(16).unwrap()).unwrap();
        let address: UnixAddr = getsockname(listener.as_raw_fd()).unwrap();
        let mut clients = Clients::new(listener, &epoll).unwrap();
        let client = packets();
        connect(client.as_raw_fd(), &address).unwrap();

        for errno in [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM] {
            assert!(clients.patience().is_none());
            std::thread::scope(|scope| {
                let accepts = scope.spawn(|| {
                    refuse_to_this_thread(libc::SYS_accept4, errno as i32);
                    clients.accept(&epoll)
                });
                accepts.join().unwrap().unwrap();
            });
            // Nobody spins on a client that is still there.
            let mut events = [EpollEvent::empty(); 4];
            assert_eq!(epoll.wait(&mut events, EpollTimeout::ZERO).unwrap(), 0);
            let patience = clients.patience().unwrap();
            assert!(patience <= ACCEPT_RETRY);
            let timeout = EpollTimeout::try_from(patience + Duration::from_millis(1)).unwrap();
            assert_eq!(epoll.wait(&mut events, timeout).unwrap(), 0);
            clients.resume(&epoll).unwrap();
            assert_eq!(epoll.wait(&mut events, EpollTimeout::ZERO).unwrap(), 1);
            assert_eq!(events[0].data(), LISTENER);
        }
        clients.accept(&epoll).unwrap();
        assert_eq!(clients.connected.len(), 1);
        assert!(clients.patience().is_none());
    }

    #[test]
    fn a_client_that_cannot_be_watched_is_closed_and_ends_nothing() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let listener = packets();
        bind(listener.as_raw_fd(), &UnixAddr::new_unnamed()).unwrap();
        listen(&listener, Backlog::new(16).unwrap()).unwrap();
        let address: UnixAddr = getsockname(listener.as_raw_fd()).unwrap();
        let mut clients = Clients::new(listener, &epoll).unwrap();
        let client = packets();
        connect(client.as_raw_fd(), &address).unwrap();
        clients.accept(&epoll).unwrap();
        let id = LISTENER + 1;
        send(client.as_fd(), &Request::Status, &[]).unwrap();
        let said = clients.read(id, &epoll).unwrap();
        assert!(matches!(said, Said::Request(Request::Status, _)));
        std::thread::scope(|scope| {
            let answers = scope.spawn(|| {
                refuse_to_this_thread(libc::SYS_epoll_ctl, libc::ENOSPC);
                clients.answer(id, &"answer", &epoll)
            });
            answers.join().unwrap().unwrap();
        });
        assert!(clients.connected.is_empty());
    }
}
