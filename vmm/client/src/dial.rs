//! Connections to ports of the guest (virtio-vsock), through the VMM's stream
//! socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// A guest answers within milliseconds; one starved of CPU within seconds.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// `OK `, the host's port of the connection in decimal, a line feed.
const MAX_ANSWER: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("cannot connect to the vsock socket {path}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("nothing in the guest accepts on vsock port {port} ({path})")]
    Refused { path: PathBuf, port: u32 },
    #[error("vsock port {port} of {path} did not answer in {} s", DIAL_TIMEOUT.as_secs())]
    TimedOut { path: PathBuf, port: u32 },
    #[error("vsock port {port} of {path} answered {answer:?} instead of OK")]
    Answer {
        path: PathBuf,
        port: u32,
        answer: String,
    },
    #[error("dialling vsock port {port} of {path} failed")]
    Io {
        path: PathBuf,
        port: u32,
        source: io::Error,
    },
}

/// Connects to `port` of the guest behind the VMM's vsock socket at `path`.
///
/// The host says `CONNECT port\n`; the VMM answers `OK hostport\n` once the
/// guest has accepted, or closes the connection when it has not.
pub async fn dial_vsock(path: &Path, port: u32) -> Result<UnixStream, DialError> {
    match timeout(DIAL_TIMEOUT, dial(path, port)).await {
        Ok(result) => result,
        Err(_) => Err(DialError::TimedOut {
            path: path.into(),
            port,
        }),
    }
}

async fn dial(path: &Path, port: u32) -> Result<UnixStream, DialError> {
    let failed = |source| DialError::Io {
        path: path.into(),
        port,
        source,
    };
    let mut stream = UnixStream::connect(path)
        .await
        .map_err(|source| DialError::Connect {
            path: path.into(),
            source,
        })?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await
        .map_err(failed)?;

    // Byte by byte: what follows the line belongs to the caller.
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    loop {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) if answer.len() < MAX_ANSWER => answer.push(byte),
            Ok(_) => break,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                ) =>
            {
                return Err(DialError::Refused {
                    path: path.into(),
                    port,
                });
            }
            Err(e) => return Err(failed(e)),
        }
    }
    let accepted = answer
        .strip_prefix(b"OK ")
        .is_some_and(|n| !n.is_empty() && n.iter().all(u8::is_ascii_digit));
    if !accepted {
        return Err(DialError::Answer {
            path: path.into(),
            port,
            answer: String::from_utf8_lossy(&answer).into_owned(),
        });
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn answer_with(reply: &'static [u8]) -> Result<UnixStream, DialError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut hello = [0; 13];
            stream.read_exact(&mut hello).await.unwrap();
            assert_eq!(&hello, b"CONNECT 1024\n");
            stream.write_all(reply).await.unwrap();
        });
        let result = dial_vsock(&path, 1024).await;
        server.await.unwrap();
        result
    }

    #[tokio::test]
    async fn bytes_after_the_answer_are_left_to_the_caller() {
        let mut stream = answer_with(b"OK 1073741824\nhello").await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn a_closed_connection_means_nobody_listens() {
        let error = answer_with(b"").await.unwrap_err();
        assert!(matches!(error, DialError::Refused { port: 1024, .. }));
    }

    #[tokio::test]
    async fn an_endless_answer_is_cut() {
        let error = answer_with(&[b'x'; 4096]).await.unwrap_err();
        assert!(matches!(error, DialError::Answer { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_missing_socket_is_named() {
        let error = dial_vsock(Path::new("/nonexistent/vsock"), 1)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/nonexistent/vsock"));
    }
}
