//! A monitor that says that its machine is ready, and nothing more.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    shutdown, socket_with,
};
use vmm_client::packet::{recv, send};
use vmm_client::protocol::{Event, Reply, Request, Status, VmState};

pub(super) struct Monitor {
    listener: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

fn ready() -> Status {
    Status {
        state: VmState::Ready,
        jailed_us: None,
        machine_started_us: None,
        guest_ready_us: None,
        log_tokens: true,
    }
}

impl Monitor {
    pub(super) fn listen(path: &Path) -> Self {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let listener = socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        listen(&listener, 16).unwrap();
        let listener = Arc::new(listener);
        let accepting = Arc::clone(&listener);
        let thread = thread::spawn(move || {
            while let Ok(client) = accept_with(&accepting, SocketFlags::CLOEXEC) {
                thread::spawn(move || converse(&client));
            }
        });
        Self {
            listener,
            thread: Some(thread),
        }
    }
}

fn converse(client: &OwnedFd) {
    while let Ok(Some(request)) = recv::<Request>(client) {
        let said = match request {
            Request::Status => send(client, &Reply::Status(ready()), &[]),
            Request::Subscribe => send(client, &Event::State(ready()), &[]),
            _ => send(client, &Reply::Ok, &[]),
        };
        if said.is_err() {
            return;
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Ends the thread that accepts; the others end with their clients.
        shutdown(&self.listener, Shutdown::Both).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}
