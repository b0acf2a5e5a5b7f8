//! Container output: streams of the guest into log files of the host.
//!
//! The daemon may restart while containers write, so their logs are the VMM's
//! work. The guest opens one stream for each of a container's stdout and
//! stderr, sends the line `container stream token\n`, then raw bytes until the
//! end. The token, which the daemon has told the agent and this process, keeps
//! other processes of the guest out of the log.
//! Once all of them are in the file the stream is closed on this side too: the
//! agent takes that as the word that nothing is missing, and only then reports
//! the container's exit.
//!
//! One thread does it ([`service`]); [`LogHandle`] is how the control socket
//! and the vsock device speak to it. A container whose log was never opened
//! has its streams closed at once: one without a log path opens none.

mod file;
pub mod framing;
mod header;
mod service;
#[cfg(test)]
mod tests;
mod unnamed;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::filter::Role;
use service::{Command, Service, Waits};
use vmm_client::LogToken;

/// Streams at once; two for each container and room for those that end.
const MAX_STREAMS: usize = 2048;

/// Containers with an open log.
const MAX_LOGS: usize = 1024;

/// Longest container id taken; CRI ids have 64 characters.
const MAX_CONTAINER: usize = 128;

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("{0:?} is not a container id")]
    BadContainer(String),
    #[error("logs of {MAX_LOGS} containers are open already")]
    TooManyLogs,
    #[error("output streams of the guest are at their limit of {MAX_STREAMS}")]
    TooManyStreams,
    #[error("the log thread has ended")]
    Stopped,
    #[error("making a socket pair for an output stream")]
    Socket(#[source] io::Error),
}

/// The thread that writes logs.
pub struct LogService;

impl LogService {
    /// Starts the thread, which lives as long as a handle does.
    /// It begins by `confine`, without which it does nothing.
    pub fn start(
        confine: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<LogHandle> {
        Self::start_with(Waits::default(), confine)
    }

    fn start_with(
        waits: Waits,
        confine: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<LogHandle> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        let (sender, commands) = mpsc::channel();
        let service = Service::new(commands, wake.clone(), waits)?;
        std::thread::Builder::new()
            .name(Role::Logs.name().into())
            .spawn(move || match confine() {
                Ok(()) => service.run(),
                Err(error) => tracing::error!(%error, "the log thread cannot be confined"),
            })?;
        Ok(LogHandle(Arc::new(Line {
            sender: Some(sender),
            wake,
            streams: Arc::new(AtomicUsize::new(0)),
        })))
    }
}

/// Speaks to the log thread; clones speak to the same one.
#[derive(Clone)]
pub struct LogHandle(Arc<Line>);

struct Line {
    /// Taken before the last wake, so that the thread finds the line dead.
    sender: Option<Sender<Command>>,
    wake: Arc<EventFd>,
    streams: Arc<AtomicUsize>,
}

impl LogHandle {
    /// Takes `container`'s output into `file` from now on. If it has a log
    /// already this is its rotation: the old file ends with a whole line, the
    /// new one goes on with the next, and this returns once the old file gets
    /// no more bytes. Streams have to name `token`; a rotation without one
    /// leaves it as it is.
    pub fn open(
        &self,
        container: &str,
        token: Option<LogToken>,
        file: File,
    ) -> Result<(), LogError> {
        if !valid_container(container.as_bytes()) {
            return Err(LogError::BadContainer(container.to_owned()));
        }
        let (reply, answer) = mpsc::channel();
        self.0.send(Command::Open {
            container: container.to_owned(),
            token,
            file,
            reply,
        })?;
        answer.recv().map_err(|_| LogError::Stopped)?
    }

    /// Forgets `container`'s log once its streams have ended; new ones are
    /// refused. One that is not open is no error.
    pub fn close(&self, container: &str) -> Result<(), LogError> {
        let (reply, answer) = mpsc::channel();
        self.0.send(Command::Close {
            container: container.to_owned(),
            reply,
        })?;
        answer.recv().map_err(|_| LogError::Stopped)
    }

    /// The guest's end of a new stream: what answers on the log port.
    pub fn connect(&self) -> Result<UnixStream, LogError> {
        let slot = StreamSlot::take(&self.0.streams)?;
        let (guest, ours) = UnixStream::pair().map_err(LogError::Socket)?;
        ours.set_nonblocking(true).map_err(LogError::Socket)?;
        self.0.send(Command::Stream { socket: ours, slot })?;
        Ok(guest)
    }

    /// The machine has ended: writes what is still in the streams, last lines
    /// without a newline included, closes them all, and returns when that is
    /// in the files.
    pub fn finish(&self) -> Result<(), LogError> {
        let (reply, answer) = mpsc::channel();
        self.0.send(Command::Finish { reply })?;
        answer.recv().map_err(|_| LogError::Stopped)
    }
}

impl Line {
    fn send(&self, command: Command) -> Result<(), LogError> {
        let sender = self.sender.as_ref().ok_or(LogError::Stopped)?;
        sender.send(command).map_err(|_| LogError::Stopped)?;
        // A counter at its limit is as awake as it gets.
        match self.wake.write(1) {
            Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(()),
            Err(_) => Err(LogError::Stopped),
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.sender = None;
        // Fails only when the counter is at its limit: the thread is awake.
        let _ = self.wake.write(1);
    }
}

/// One of the [`MAX_STREAMS`], given back when dropped.
struct StreamSlot(Arc<AtomicUsize>);

impl StreamSlot {
    fn take(count: &Arc<AtomicUsize>) -> Result<Self, LogError> {
        let slot = Self(count.clone());
        if count.fetch_add(1, Ordering::Relaxed) < MAX_STREAMS {
            Ok(slot)
        } else {
            Err(LogError::TooManyStreams)
        }
    }
}

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn valid_container(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_CONTAINER
        && name
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}
