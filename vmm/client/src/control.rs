//! The daemon's end of the control protocol.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::LogToken;
use crate::packet::AsyncPackets;
use crate::protocol::{Event, MAX_FDS, Reply, Request, Status};
use crate::text::plain;

/// The VMM answers at once unless its disk thread waits for the host's disk.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A full backlog is the only reason for a connect to wait.
const CONNECT_TIMEOUT_SECONDS: i64 = 5;

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("cannot connect to the VMM's control socket {path}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("the VMM behind {path} has gone")]
    Gone { path: PathBuf },
    #[error("the VMM behind {path} did not answer {request} in {} s", CALL_TIMEOUT.as_secs())]
    TimedOut {
        path: PathBuf,
        request: &'static str,
    },
    #[error("{request} to the VMM behind {path} failed")]
    Io {
        path: PathBuf,
        request: &'static str,
        source: io::Error,
    },
    #[error("the VMM refused {request}: {message}")]
    Refused {
        request: &'static str,
        message: String,
    },
    #[error("the VMM behind {path} gave {request} an answer of another kind")]
    Answer {
        path: PathBuf,
        request: &'static str,
    },
    #[error("{request} carries {count} descriptors, {MAX_FDS} allowed")]
    TooManyFds { request: &'static str, count: usize },
}

/// A connection to a VMM. A call that fails or is dropped half-way closes the
/// connection, so that no answer is taken for another; the next call connects
/// again.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    socket: Option<AsyncPackets>,
}

impl Control {
    /// Connects to the control socket at `path`.
    pub async fn connect(path: &Path) -> Result<Self, ControlError> {
        Ok(Self {
            path: path.into(),
            socket: Some(open(path).await?),
        })
    }

    pub async fn status(&mut self) -> Result<Status, ControlError> {
        match self.call("status", &Request::Status, &[]).await? {
            Reply::Status(status) => Ok(status),
            _ => Err(ControlError::Answer {
                path: self.path.clone(),
                request: "status",
            }),
        }
    }

    /// Backs disk slot `slot` by the files, one after another.
    pub async fn attach_disk(
        &mut self,
        slot: u32,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        self.order("attach-disk", &Request::AttachDisk { slot }, files)
            .await
    }

    /// Backs disk slot `slot` by a block device.
    pub async fn attach_device(
        &mut self,
        slot: u32,
        device: BorrowedFd<'_>,
        read_only: bool,
    ) -> Result<(), ControlError> {
        let request = Request::AttachDevice { slot, read_only };
        self.order("attach-device", &request, &[device]).await
    }

    pub async fn detach_disk(&mut self, slot: u32) -> Result<(), ControlError> {
        self.order("detach-disk", &Request::DetachDisk { slot }, &[])
            .await
    }

    /// Takes the output of `container` into `log`, or goes on in `log` after
    /// a rotation. With a token only streams that have it are the container's;
    /// a VMM without [`Status::log_tokens`] takes none.
    pub async fn open_log(
        &mut self,
        container: &str,
        token: Option<LogToken>,
        log: BorrowedFd<'_>,
    ) -> Result<(), ControlError> {
        let request = Request::OpenLog {
            container: container.into(),
            token,
        };
        self.order("open-log", &request, &[log]).await
    }

    pub async fn close_log(&mut self, container: &str) -> Result<(), ControlError> {
        let request = Request::CloseLog {
            container: container.into(),
        };
        self.order("close-log", &request, &[]).await
    }

    /// Asks the guest to do without `mib` MiB of its memory.
    pub async fn set_balloon(&mut self, mib: u32) -> Result<(), ControlError> {
        self.order("set-balloon", &Request::SetBalloon { mib }, &[])
            .await
    }

    /// Ends the machine now. A VMM that has gone already is no error.
    pub async fn kill(&mut self) -> Result<(), ControlError> {
        match self.order("kill", &Request::Kill, &[]).await {
            Err(ControlError::Gone { .. }) => Ok(()),
            other => other,
        }
    }

    /// Turns this connection into the machine's events, the present state
    /// first.
    pub async fn subscribe(mut self) -> Result<Events, ControlError> {
        let socket = self.take().await?;
        let path = self.path;
        send(&path, &socket, "subscribe", &Request::Subscribe, &[]).await?;
        Ok(Events { path, socket })
    }

    async fn take(&mut self) -> Result<AsyncPackets, ControlError> {
        match self.socket.take() {
            Some(socket) => Ok(socket),
            None => open(&self.path).await,
        }
    }

    async fn order(
        &mut self,
        name: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        match self.call(name, request, fds).await? {
            Reply::Ok => Ok(()),
            _ => Err(ControlError::Answer {
                path: self.path.clone(),
                request: name,
            }),
        }
    }

    async fn call(
        &mut self,
        name: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, ControlError> {
        if fds.len() > MAX_FDS {
            return Err(ControlError::TooManyFds {
                request: name,
                count: fds.len(),
            });
        }
        let socket = self.take().await?;
        let path = &self.path;
        let exchange = async {
            send(path, &socket, name, request, fds).await?;
            recv::<Reply>(path, &socket, name)
                .await?
                .ok_or_else(|| ControlError::Gone { path: path.clone() })
        };
        let reply = match timeout(CALL_TIMEOUT, exchange).await {
            Ok(reply) => reply?,
            Err(_) => {
                return Err(ControlError::TimedOut {
                    path: path.clone(),
                    request: name,
                });
            }
        };
        self.socket = Some(socket);
        match reply {
            Reply::Error { message } => Err(ControlError::Refused {
                request: name,
                message: plain(&message),
            }),
            reply => Ok(reply),
        }
    }
}

/// What happens to a machine, as it happens.
#[derive(Debug)]
pub struct Events {
    path: PathBuf,
    socket: AsyncPackets,
}

impl Events {
    /// The next event; `None` once the VMM has gone. Safe to drop and call
    /// again: no event is lost.
    pub async fn next(&mut self) -> Result<Option<Event>, ControlError> {
        recv(&self.path, &self.socket, "subscribe").await
    }
}

async fn open(path: &Path) -> Result<AsyncPackets, ControlError> {
    let failed = |source: io::Error| ControlError::Connect {
        path: path.into(),
        source,
    };
    let target = path.to_owned();
    // Connecting to a unix socket waits for room in the backlog, and nothing
    // tells when there is some: so it blocks, on a thread for blocking calls.
    let socket = tokio::task::spawn_blocking(move || blocking_connect(&target))
        .await
        .map_err(|join| failed(io::Error::other(join)))?
        .map_err(failed)?;
    AsyncPackets::new(socket).map_err(failed)
}

fn blocking_connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let limit = TimeVal::seconds(CONNECT_TIMEOUT_SECONDS);
    setsockopt(&socket, sockopt::SendTimeout, &limit)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

async fn send(
    path: &Path,
    socket: &AsyncPackets,
    name: &'static str,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<(), ControlError> {
    socket
        .send(request, fds)
        .await
        .map_err(|source| sort(path, name, source))
}

async fn recv<T: DeserializeOwned>(
    path: &Path,
    socket: &AsyncPackets,
    name: &'static str,
) -> Result<Option<T>, ControlError> {
    match socket.recv().await {
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        other => other.map_err(|source| sort(path, name, source)),
    }
}

fn sort(path: &Path, request: &'static str, source: io::Error) -> ControlError {
    match source.kind() {
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::NotConnected => ControlError::Gone { path: path.into() },
        _ => ControlError::Io {
            path: path.into(),
            request,
            source,
        },
    }
}
