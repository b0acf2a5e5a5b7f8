//! Standard output from a container's pipes or terminal to the host's log, and
//! to those attached.
//!
//! Each stream has a vsock connection of its own to the host's log port: one
//! header line, then the bytes as they are. A host that does not take them
//! fills the connection, then the pipe, and then the container waits in
//! write(2): nothing is dropped and nothing piles up here.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use nix::unistd::{fchown, pipe2};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_vsock::{VsockAddr, VsockStream};

use super::tee::Tee;
use crate::{HOST_CID, log, sys};

/// The host's vsock port that takes output (the VMM's `LOG_PORT`).
const LOG_PORT: u32 = 2;

/// What one read takes: all that a pipe holds.
pub const CHUNK: usize = 64 * 1024;

/// How long a pipe may stay silent after its process ended before it is given
/// up: a process of another container may hold it, having been given it.
const QUIET: Duration = Duration::from_secs(1);

/// How long the host may take nothing before output is given up: a full disk
/// on its side shall not keep a container from ending.
const HOST_STALL: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    #[error("cannot make the container's standard streams")]
    Create(#[source] io::Error),
    #[error("cannot reach the host's log port for {stream} of container {id}")]
    Connect {
        id: String,
        stream: &'static str,
        source: io::Error,
    },
    #[error("the log's token has {length} bytes, {} belong", LogToken::LEN)]
    Token { length: usize },
}

fn create(errno: Errno) -> StdioError {
    StdioError::Create(errno.into())
}

/// A pipe whose read end does not block.
fn output_pipe() -> nix::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((read, write))
}

fn null() -> nix::Result<OwnedFd> {
    open(
        c"/dev/null",
        OFlag::O_RDWR | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}

/// The agent's ends of a container's streams, and what the child gets.
pub struct Streams {
    pub child: [OwnedFd; 3],
    /// Kept open for a container that reads its standard input.
    pub stdin: Option<OwnedFd>,
    pub outputs: Vec<(&'static str, OwnedFd)>,
}

/// Streams of a process without a terminal. The pipes are user `uid`'s, who
/// could not open /dev/stdout otherwise.
pub fn streams(uid: u32, stdin: bool) -> Result<Streams, StdioError> {
    let own = |pipe: &OwnedFd| match uid {
        0 => Ok(()),
        uid => fchown(pipe, Some(uid.into()), None).map_err(create),
    };
    let (child_in, stdin) = if stdin {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(create)?;
        own(&read)?;
        (read, Some(write))
    } else {
        (null().map_err(create)?, None)
    };
    let mut outputs = Vec::new();
    let mut output = |stream| -> Result<OwnedFd, StdioError> {
        let (read, write) = output_pipe().map_err(create)?;
        own(&write)?;
        outputs.push((stream, read));
        Ok(write)
    };
    let child = [child_in, output("stdout")?, output("stderr")?];
    Ok(Streams {
        child,
        stdin,
        outputs,
    })
}

/// What the host knows a container's streams by.
#[derive(Clone, Copy)]
pub struct LogToken([u8; LogToken::LEN]);

impl LogToken {
    pub const LEN: usize = 16;

    /// `None` for a host that asks for none.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, StdioError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let token = bytes.try_into().map_err(|_| StdioError::Token {
            length: bytes.len(),
        })?;
        Ok(Some(Self(token)))
    }
}

/// The line by which the host knows whose a stream is.
fn header(id: &str, stream: &str, token: Option<LogToken>) -> String {
    let mut line = format!("{id} {stream}");
    if let Some(LogToken(bytes)) = token {
        line += &format!(" {:032x}", u128::from_be_bytes(bytes));
    }
    line + "\n"
}

/// A connection to the host that takes one stream of container `id`.
pub async fn connect(
    id: &str,
    stream: &'static str,
    token: Option<LogToken>,
) -> Result<VsockStream, StdioError> {
    let failed = |source| StdioError::Connect {
        id: id.to_owned(),
        stream,
        source,
    };
    let mut host = VsockStream::connect(VsockAddr::new(HOST_CID, LOG_PORT))
        .await
        .map_err(failed)?;
    host.write_all(header(id, stream, token).as_bytes())
        .await
        .map_err(failed)?;
    Ok(host)
}

/// Reads from a pipe or terminal until its end, or until it stays silent after
/// `ended` has turned true.
pub struct Source {
    fd: AsyncFd<OwnedFd>,
    ended: watch::Receiver<bool>,
    /// Nothing more is heard of `ended`: as good as true.
    orphaned: bool,
}

impl Source {
    /// `fd` must not block.
    pub fn new(fd: OwnedFd, ended: watch::Receiver<bool>) -> io::Result<Self> {
        Ok(Self {
            fd: sys::async_fd(fd, Interest::READABLE)?,
            ended,
            orphaned: false,
        })
    }

    pub fn has_ended(&self) -> bool {
        self.orphaned || *self.ended.borrow()
    }

    /// Some bytes, or 0 at the end.
    pub async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let ready = if self.has_ended() {
                match timeout(QUIET, self.fd.readable()).await {
                    Ok(ready) => ready,
                    Err(_) => return Ok(0),
                }
            } else {
                tokio::select! {
                    biased;
                    ready = self.fd.readable() => ready,
                    ended = self.ended.wait_for(|ended| *ended) => {
                        self.orphaned = ended.is_err();
                        continue;
                    }
                }
            };
            let mut ready = ready?;
            match nix::unistd::read(self.fd.as_fd(), buffer) {
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                // A terminal's master, once nobody has its other side open.
                Err(Errno::EIO) => return Ok(0),
                Err(errno) => return Err(errno.into()),
                Ok(length) => return Ok(length),
            }
        }
    }
}

/// Moves all of `source` to the host, tells it of the end and waits until it
/// has taken everything. A connection that breaks does not stop the container:
/// the rest of its output is not logged. Those attached get what was logged.
pub async fn pump(
    id: &str,
    stream: &str,
    mut source: Source,
    mut host: Option<impl AsyncRead + AsyncWrite + Unpin>,
    tee: &Tee,
) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = match source.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) => {
                log::warn(format_args!(
                    "container {id}: cannot read {stream}: {error}"
                ));
                break;
            }
        };
        let bytes = &buffer[..length];
        if let Some(connection) = &mut host
            && let Err(error) = send(connection, bytes, &source.ended).await
        {
            log::warn(format_args!(
                "container {id}: {stream} is lost from here: {error}"
            ));
            host = None;
        }
        tee.give(bytes).await;
    }
    tee.end();
    if let Some(mut connection) = host
        && let Err(error) = finish(&mut connection).await
    {
        log::warn(format_args!(
            "container {id}: the host may lack the end of {stream}: {error}"
        ));
    }
}

/// Waits without bound for the host while the container runs.
async fn send(
    host: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    ended: &watch::Receiver<bool>,
) -> io::Result<()> {
    let mut ended = ended.clone();
    let mut rest = bytes;
    while !rest.is_empty() {
        let written = tokio::select! {
            biased;
            written = host.write(rest) => written?,
            _ = async {
                let _ = ended.wait_for(|ended| *ended).await;
                tokio::time::sleep(HOST_STALL).await;
            } => return Err(stalled()),
        };
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        rest = &rest[written..];
    }
    Ok(())
}

/// The host closes its side once it has written what it got.
async fn finish(host: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
    host.shutdown().await?;
    let mut byte = [0; 1];
    match timeout(HOST_STALL, host.read(&mut byte)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(stalled()),
    }
}

fn stalled() -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("the host took nothing for {} s", HOST_STALL.as_secs()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_says_whose_it_is() {
        assert_eq!(header("c", "stdout", None), "c stdout\n");
        let mut bytes = [0; 16];
        bytes[0] = 0xa0;
        let token = LogToken::parse(&bytes).unwrap();
        let digits = format!("a0{}", "0".repeat(30));
        assert_eq!(header("c", "stderr", token), format!("c stderr {digits}\n"));
        assert!(LogToken::parse(&[]).unwrap().is_none());
        assert!(LogToken::parse(&[0; 15]).is_err());
    }

    async fn read_all(mut source: Source) -> Vec<u8> {
        let mut all = Vec::new();
        let mut buffer = [0; 8];
        loop {
            match source.read(&mut buffer).await.unwrap() {
                0 => return all,
                length => all.extend_from_slice(&buffer[..length]),
            }
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_pipe_is_read_to_its_end() {
        let (read, write) = output_pipe().unwrap();
        let (_ended, receiver) = watch::channel(false);
        let reader = tokio::spawn(read_all(Source::new(read, receiver).unwrap()));
        nix::unistd::write(&write, b"hello, all of it").unwrap();
        drop(write);
        assert_eq!(reader.await.unwrap(), b"hello, all of it");
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn a_pipe_that_someone_else_holds_is_given_up_after_the_end() {
        let (read, write) = output_pipe().unwrap();
        let (ended, receiver) = watch::channel(false);
        nix::unistd::write(&write, b"last words").unwrap();
        let reader = tokio::spawn(read_all(Source::new(read, receiver).unwrap()));
        tokio::task::yield_now().await;
        ended.send(true).unwrap();
        assert_eq!(reader.await.unwrap(), b"last words");
        drop(write);
    }
}
