//! The stream socket, which answers as a microVM's does: `CONNECT port` is
//! answered with `OK`, and what follows is the agent's gRPC or one raw stream.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use agent_api::stream::STREAM_PORT;
use drupe_agent::container::session::Sessions;
use drupe_agent::streams::{MAX_FORWARDS, MAX_GREETINGS, greet};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use vmm_client::protocol::AGENT_PORT;

/// Who has connected says what it wants at once.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// `CONNECT `, a port in decimal, a line feed.
const MAX_GREETING: usize = 32;
/// gRPC connections that wait for the server.
const QUEUE: usize = 8;
/// Between attempts to accept when descriptors have run out.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves for as long as the runtime lives; gRPC connections come out.
pub fn serve(
    listener: UnixListener,
    sessions: Arc<Sessions>,
) -> mpsc::Receiver<io::Result<UnixStream>> {
    let (calls, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(accept(listener, sessions, calls));
    receiver
}

async fn accept(
    listener: UnixListener,
    sessions: Arc<Sessions>,
    calls: mpsc::Sender<io::Result<UnixStream>>,
) {
    let greetings = Arc::new(Semaphore::new(MAX_GREETINGS));
    let forwards = Arc::new(Semaphore::new(MAX_FORWARDS));
    // The semaphore is never closed.
    while let Ok(place) = greetings.clone().acquire_owned().await {
        let mut stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a stream");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let (calls, sessions, forwards) = (calls.clone(), sessions.clone(), forwards.clone());
        tokio::spawn(async move {
            match timeout(GREETING_TIMEOUT, asked(&mut stream)).await {
                Ok(Ok(AGENT_PORT)) => {
                    drop(place);
                    // The server goes only with this process.
                    let _ = calls.send(Ok(stream)).await;
                }
                Ok(Ok(STREAM_PORT)) => greet(stream, place, sessions, forwards).await,
                // The end of the connection is the answer.
                Ok(Ok(_)) | Ok(Err(_)) | Err(_) => {}
            }
        });
    }
}

/// The port that is asked for; answered where there is one.
async fn asked(stream: &mut UnixStream) -> io::Result<u32> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let mut line = Vec::new();
    loop {
        // One at a time: what follows belongs to somebody else.
        match stream.read_u8().await? {
            b'\n' => break,
            byte if line.len() < MAX_GREETING => line.push(byte),
            _ => return Err(bad()),
        }
    }
    let line = std::str::from_utf8(&line).map_err(|_| bad())?;
    let port = line.strip_prefix("CONNECT ").ok_or_else(bad)?;
    let port = port.parse().map_err(|_| bad())?;
    if matches!(port, AGENT_PORT | STREAM_PORT) {
        stream.write_all(format!("OK {port}\n").as_bytes()).await?;
    }
    Ok(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn what_is_connected_to_is_told_by_its_port() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut calls = serve(UnixListener::bind(&path).unwrap(), Arc::default());
        let mut client = vmm_client::dial_vsock(&path, AGENT_PORT).await.unwrap();
        let mut served = calls.recv().await.unwrap().unwrap();
        client.write_all(b"x").await.unwrap();
        assert_eq!(served.read_u8().await.unwrap(), b'x');
        vmm_client::dial_vsock(&path, STREAM_PORT).await.unwrap();
        let refused = vmm_client::dial_vsock(&path, 7).await.unwrap_err();
        assert!(matches!(refused, vmm_client::DialError::Refused { .. }));
        let mut silly = UnixStream::connect(&path).await.unwrap();
        silly.write_all(&[b'a'; 100]).await.unwrap();
        let end = silly.read(&mut [0]).await;
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    }
}
