//! Exec and attach: a process's streams joined with the client's.

use std::io;

use bytes::{Bytes, BytesMut};
use futures_util::future::{join, pending};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::inbox::Inbox;
use super::outbox::Closed;
use super::session::{Session, Wanted};
use super::status::{self, StatusFormat};
use super::{PIECE, STREAM_CREATION, spdy, websocket};

/// A terminal's size as JSON is below 40 bytes.
const MAX_SIZE_TEXT: usize = 1024;

/// Where output for the client goes.
pub enum Output {
    Spdy(spdy::Sender),
    Channel(websocket::Channel),
}

impl Output {
    pub async fn send(&mut self, data: Bytes) -> Result<(), Closed> {
        match self {
            Self::Spdy(sender) => sender.send(data).await,
            Self::Channel(channel) => channel.send(data).await,
        }
    }

    /// WebSocket channels have no end of their own: the connection's is it.
    pub async fn finish(self) -> Result<(), Closed> {
        match self {
            Self::Spdy(sender) => sender.finish().await,
            Self::Channel(_) => Ok(()),
        }
    }
}

/// What the client opened.
pub struct ClientStreams {
    pub stdin: Option<Inbox>,
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    pub resize: Option<Inbox>,
    pub error: Output,
    /// Our halves of streams on which only the client speaks. They are reset
    /// at the end, which makes a client stop that still sends.
    pub silent: Vec<spdy::Sender>,
}

/// Joins the session with the client until the process has ended and the
/// client was told how. To be dropped when the client is gone.
pub async fn run(
    session: impl Future<Output = Result<Session, String>>,
    client: ClientStreams,
    format: StatusFormat,
) {
    let ClientStreams {
        stdin,
        stdout,
        stderr,
        resize,
        mut error,
        silent,
    } = client;
    let outcome = match session.await {
        Err(why) => Err(why),
        Ok(session) => {
            let outputs = join(
                copy_out(session.stdout, stdout),
                copy_out(session.stderr, stderr),
            );
            let inputs = join(
                copy_in(stdin, session.stdin),
                copy_sizes(resize, session.resize),
            );
            let ended = async { join(outputs, session.exit).await.1 };
            tokio::select! {
                biased;
                outcome = ended => outcome,
                // A closed standard input ends nothing.
                never = async { inputs.await; pending().await } => never,
            }
        }
    };
    let report = status::report(&outcome, format);
    // A client that reset its error stream does not want to know.
    if report.is_empty() || error.send(report).await.is_ok() {
        let _told = error.finish().await.is_ok();
    }
    drop(silent);
}

async fn copy_out(from: Option<Box<dyn AsyncRead + Send + Unpin>>, to: Option<Output>) {
    let Some(mut to) = to else {
        return;
    };
    if let Some(mut from) = from {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(PIECE);
            match from.read_buf(&mut buffer).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    // The exit that follows says what became of the pod.
                    tracing::debug!(%error, "an output stream broke off");
                    break;
                }
            }
            // A client that wants no more of it lets the process see that.
            if to.send(buffer.split().freeze()).await.is_err() {
                return;
            }
        }
    }
    let _told = to.finish().await.is_ok();
}

async fn copy_in(from: Option<Inbox>, to: Option<Box<dyn AsyncWrite + Send + Unpin>>) {
    let (Some(mut from), Some(mut to)) = (from, to) else {
        return;
    };
    // A client that resets the stream says no more, either; when all of it is
    // gone, the whole session is dropped.
    while let Ok(Some(data)) = from.recv().await {
        if let Err(error) = to.write_all(&data).await {
            if error.kind() != io::ErrorKind::BrokenPipe {
                tracing::debug!(%error, "standard input broke off");
            }
            return;
        }
    }
    if let Err(error) = to.shutdown().await {
        tracing::debug!(%error, "standard input could not be ended");
    }
}

async fn copy_sizes(from: Option<Inbox>, to: Option<mpsc::Sender<(u16, u16)>>) {
    let (Some(mut from), Some(to)) = (from, to) else {
        return;
    };
    let mut sizes = SizeReader::default();
    while let Ok(Some(data)) = from.recv().await {
        let read = match sizes.read(&data) {
            Ok(read) => read,
            Err(error) => {
                tracing::debug!(%error, "a client's terminal sizes are not read any more");
                return;
            }
        };
        // Of sizes that came together, only the last is still true.
        if let Some(size) = read
            && to.send(size).await.is_err()
        {
            return;
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SizeError {
    #[error("not a terminal size")]
    Json(#[from] serde_json::Error),
    #[error("a terminal size of more than {MAX_SIZE_TEXT} bytes")]
    TooLong,
}

/// Reads `{"Width":80,"Height":24}` one after the other, however they are cut
/// into pieces.
#[derive(Default)]
pub struct SizeReader {
    rest: Vec<u8>,
}

#[derive(Deserialize)]
struct Size {
    #[serde(alias = "Width", default)]
    width: u16,
    #[serde(alias = "Height", default)]
    height: u16,
}

impl SizeReader {
    /// The last size that is complete now: width and height.
    pub fn read(&mut self, data: &[u8]) -> Result<Option<(u16, u16)>, SizeError> {
        self.rest.extend_from_slice(data);
        let mut sizes = serde_json::Deserializer::from_slice(&self.rest).into_iter::<Size>();
        let mut last = None;
        let read = loop {
            let before = sizes.byte_offset();
            match sizes.next() {
                Some(Ok(size)) => last = Some((size.width, size.height)),
                Some(Err(error)) if error.is_eof() => break before,
                Some(Err(error)) => return Err(error.into()),
                None => break sizes.byte_offset(),
            }
        };
        self.rest.drain(..read.min(self.rest.len()));
        if self.rest.len() > MAX_SIZE_TEXT {
            return Err(SizeError::TooLong);
        }
        Ok(last)
    }
}

/// Waits for the streams that the client must open. `None` if it does not, in
/// time.
pub async fn collect(
    connection: &mut spdy::Connection,
    wanted: Wanted,
    resizes: bool,
) -> Option<ClientStreams> {
    let opened = tokio::time::timeout(STREAM_CREATION, gather(connection, wanted, resizes)).await;
    let streams = match opened {
        Ok(streams) => streams,
        Err(_) => {
            tracing::debug!("a client did not open its streams in time");
            None
        }
    };
    connection.refuse_more();
    streams
}

async fn gather(
    connection: &mut spdy::Connection,
    wanted: Wanted,
    resizes: bool,
) -> Option<ClientStreams> {
    let mut missing: Vec<&str> = [
        ("error", true),
        ("stdin", wanted.stdin),
        ("stdout", wanted.stdout),
        ("stderr", wanted.stderr),
        ("resize", wanted.tty && resizes),
    ]
    .into_iter()
    .filter_map(|(name, wanted)| wanted.then_some(name))
    .collect();
    let (mut stdin, mut stdout, mut stderr, mut error, mut resize) = (None, None, None, None, None);
    let mut silent = Vec::new();
    while !missing.is_empty() {
        let stream = connection.accept().await?;
        let kind = stream.headers.get("streamtype").unwrap_or_default();
        let Some(place) = missing.iter().position(|name| *name == kind) else {
            // Unasked for, or a second one: refused by being dropped.
            tracing::debug!(kind, "a client opened a stream that it did not announce");
            continue;
        };
        if stream.reply().is_err() {
            return None;
        }
        match missing.swap_remove(place) {
            "stdin" => {
                stdin = Some(stream.inbox);
                silent.push(stream.sender);
            }
            "resize" => {
                resize = Some(stream.inbox);
                silent.push(stream.sender);
            }
            "stdout" => stdout = Some(Output::Spdy(stream.sender)),
            "stderr" => stderr = Some(Output::Spdy(stream.sender)),
            _ => error = Some(Output::Spdy(stream.sender)),
        }
    }
    Some(ClientStreams {
        stdin,
        stdout,
        stderr,
        resize,
        error: error?,
        silent,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_however_they_are_cut() {
        let mut sizes = SizeReader::default();
        let mut read = |text: &str| sizes.read(text.as_bytes()).unwrap();
        assert_eq!(read("{\"Width\":80,\"Height\":24}\n"), Some((80, 24)));
        assert_eq!(read("{\"Width\":1"), None);
        assert_eq!(read("00,\"Height\":50}{\"Wid"), Some((100, 50)));
        assert_eq!(
            read("th\":7,\"Height\":8}{\"Width\":9,\"Height\":10}"),
            Some((9, 10))
        );
        assert_eq!(read(""), None);
    }

    #[test]
    fn what_is_no_size_ends_the_reading() {
        for text in ["hello", "{\"Width\":70000,\"Height\":1}", "[1,2,3]"] {
            assert!(
                SizeReader::default().read(text.as_bytes()).is_err(),
                "{text}"
            );
        }
        let long = format!("{{\"Width\":\"{}", "x".repeat(2 * MAX_SIZE_TEXT));
        assert!(SizeReader::default().read(long.as_bytes()).is_err());
    }
}
