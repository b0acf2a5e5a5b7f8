//! The VMM's control protocol, as far as a pod without a machine has it:
//! status, logs, and the end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use drupe_agent::server::sentence;
use drupe_agent::sys::async_fd;
use drupe_vmm::logs::{LogError, LogHandle};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use vmm_client::packet::send;
use vmm_client::protocol::{Event, MAX_MESSAGE, Reply, Request, Status, VmState};

use crate::packet;

/// Connections at once; more wait in the listener's backlog. The daemon needs
/// two.
const MAX_CLIENTS: usize = 32;
/// Between attempts to accept when descriptors have run out.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What every connection needs.
#[derive(Clone)]
pub struct Control {
    pub logs: LogHandle,
    pub status: Arc<watch::Sender<Status>>,
    /// Turned true when the pod is to end.
    pub shutdown: Arc<watch::Sender<bool>>,
}

#[must_use]
pub fn ready() -> Status {
    Status {
        state: VmState::Ready,
        jailed_us: None,
        machine_started_us: None,
        guest_ready_us: None,
        // No program of a container reaches the logs but by its own streams.
        log_tokens: false,
    }
}

impl Control {
    /// Serves for as long as the runtime lives.
    pub async fn serve(self, listener: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        let listener = async_fd(listener, Interest::READABLE)?;
        let places = Arc::new(Semaphore::new(MAX_CLIENTS));
        // The semaphore is never closed.
        while let Ok(place) = places.clone().acquire_owned().await {
            match accept(&listener).await {
                Ok(socket) => drop(tokio::spawn(self.clone().follow(socket, place))),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a control connection");
                    sleep(ACCEPT_RETRY).await;
                }
            }
        }
        Ok(())
    }

    async fn follow(self, socket: OwnedFd, _place: OwnedSemaphorePermit) {
        if let Err(error) = self.converse(socket).await {
            tracing::debug!(%error, "a control connection broke");
        }
    }

    async fn converse(&self, socket: OwnedFd) -> io::Result<()> {
        let socket = async_fd(socket, Interest::READABLE)?;
        let mut buffer = vec![0; MAX_MESSAGE];
        while let Some((request, fds)) = next(&socket, &mut buffer).await? {
            let reply = match request {
                Request::Status => Reply::Status(self.status.borrow().clone()),
                Request::Subscribe => return self.tell_all(&socket).await,
                Request::OpenLog { container, token } => match <[OwnedFd; 1]>::try_from(fds) {
                    Ok([file]) => {
                        self.on_logs(move |logs| logs.open(&container, token, file.into()))
                            .await
                    }
                    Err(fds) => refused(format!(
                        "open-log with {} descriptors, one belongs",
                        fds.len()
                    )),
                },
                Request::CloseLog { container } => {
                    self.on_logs(move |logs| logs.close(&container)).await
                }
                Request::AttachDisk { .. }
                | Request::AttachDevice { .. }
                | Request::DetachDisk { .. } => {
                    refused("a pod on the host's kernel has no disks".to_owned())
                }
                Request::SetBalloon { .. } => {
                    refused("a pod on the host's kernel has no memory of its own".to_owned())
                }
                Request::Kill => {
                    send(socket.get_ref(), &Reply::Ok, &[])?;
                    self.shutdown.send_replace(true);
                    continue;
                }
            };
            // One that does not read its answers is as good as gone.
            send(socket.get_ref(), &reply, &[])?;
        }
        Ok(())
    }

    async fn tell_all(&self, socket: &AsyncFd<OwnedFd>) -> io::Result<()> {
        let mut status = self.status.subscribe();
        loop {
            let event = Event::State(status.borrow_and_update().clone());
            send(socket.get_ref(), &event, &[])?;
            let mut ready = tokio::select! {
                // The sender lives as long as the process.
                _ = status.changed() => continue,
                ready = socket.readable() => ready?,
            };
            match rustix::net::recv(
                socket.get_ref(),
                &mut [0u8; 1],
                rustix::net::RecvFlags::PEEK,
            ) {
                Err(Errno::AGAIN) => ready.clear_ready(),
                // A subscriber says nothing more: it has gone.
                _ => return Ok(()),
            }
        }
    }

    /// The log thread may wait for a disk.
    async fn on_logs(
        &self,
        call: impl FnOnce(&LogHandle) -> Result<(), LogError> + Send + 'static,
    ) -> Reply {
        let logs = self.logs.clone();
        match spawn_blocking(move || call(&logs)).await {
            Ok(Ok(())) => Reply::Ok,
            Ok(Err(error)) => refused(sentence(&error)),
            Err(error) => refused(error.to_string()),
        }
    }
}

fn refused(message: String) -> Reply {
    Reply::Error { message }
}

async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<OwnedFd> {
    loop {
        let mut ready = listener.readable().await?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match accept_with(listener.get_ref(), flags) {
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            accepted => return Ok(accepted?),
        }
    }
}

async fn next(
    socket: &AsyncFd<OwnedFd>,
    buffer: &mut [u8],
) -> io::Result<Option<(Request, Vec<OwnedFd>)>> {
    loop {
        let mut ready = socket.readable().await?;
        match packet::request(socket.get_ref().as_fd(), buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            received => return received,
        }
    }
}
