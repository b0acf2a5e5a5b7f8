//! Forwarded ports: each connection that a client's machine accepted is a
//! pair of streams, one for its bytes and one for an error in words.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::pending;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::inbox::Inbox;
use super::outbox::Closed;
use super::remote_command::Output;
use super::session::{Backend, PortForwardRequest};
use super::spdy::{Connection, Stream};
use super::websocket::Channels;
use super::{PIECE, STREAM_CREATION};

/// Pairs of which one half is missing.
const MAX_HALF_OPEN: usize = 1024;
/// A client whose pod has said all it had may still send, but not be silent
/// for longer: a pod's program that has closed altogether looks the same.
const HALF_CLOSED: Duration = Duration::from_secs(60);
/// The first channels of the ports of a request; 255 is none.
const CHANNELS: std::ops::RangeInclusive<u8> = 0..=198;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Data,
    Error,
}

/// A half that waits for the other.
struct Half {
    role: Role,
    stream: Stream,
    since: Instant,
}

/// Serves until the client is gone.
pub async fn over_spdy(mut connection: Connection, backend: &Arc<dyn Backend>, pod_id: &str) {
    let mut pairs = JoinSet::new();
    let mut halves: HashMap<String, Half> = HashMap::new();
    loop {
        let oldest = halves.values().map(|half| half.since).min();
        let expiry = async {
            match oldest {
                Some(since) => tokio::time::sleep_until(since + STREAM_CREATION).await,
                None => pending().await,
            }
        };
        let stream = tokio::select! {
            stream = connection.accept() => stream,
            () = expiry => {
                for (id, half) in expired(&mut halves) {
                    pairs.spawn(abandon(id, half));
                }
                continue;
            }
            Some(_) = pairs.join_next() => continue,
        };
        // With it gone, what is under way is dropped.
        let Some(stream) = stream else {
            return;
        };
        let Some((port, role)) = target(&stream) else {
            tracing::debug!(headers = ?stream.headers, "a stream that forwards nothing");
            continue;
        };
        let id = request_id(&stream, role);
        match halves.remove(&id) {
            None if halves.len() >= MAX_HALF_OPEN => {}
            None => {
                if stream.reply().is_ok() {
                    let since = Instant::now();
                    halves.insert(
                        id,
                        Half {
                            role,
                            stream,
                            since,
                        },
                    );
                }
            }
            Some(half) if half.role == role => {
                tracing::debug!(id, "a second stream for the same half of a connection");
                halves.insert(id, half);
            }
            Some(half) => {
                if stream.reply().is_err() {
                    return;
                }
                let (data, error) = match role {
                    Role::Data => (stream, half.stream),
                    Role::Error => (half.stream, stream),
                };
                let (backend, pod_id) = (Arc::clone(backend), pod_id.to_owned());
                pairs.spawn(async move {
                    let error = Output::Spdy(error.sender);
                    let sender = Output::Spdy(data.sender);
                    pair(&*backend, &pod_id, port, data.inbox, sender, error).await;
                });
            }
        }
    }
}

fn target(stream: &Stream) -> Option<(u16, Role)> {
    let role = match stream.headers.get("streamtype")? {
        "data" => Role::Data,
        "error" => Role::Error,
        _ => return None,
    };
    let port = stream.headers.get("port")?.parse().ok()?;
    (port != 0).then_some((port, role))
}

/// Old clients send no id, but open the error's stream and then the data's.
fn request_id(stream: &Stream, role: Role) -> String {
    match (stream.headers.get("requestid"), role) {
        (Some(id), _) => id.to_owned(),
        (None, Role::Error) => format!("#{}", stream.id),
        (None, Role::Data) => format!("#{}", stream.id.saturating_sub(2)),
    }
}

fn expired(halves: &mut HashMap<String, Half>) -> Vec<(String, Half)> {
    let now = Instant::now();
    halves
        .extract_if(|_, half| half.since + STREAM_CREATION <= now)
        .collect()
}

async fn abandon(id: String, half: Half) {
    tracing::debug!(id, "half of a forwarded connection is missing");
    if half.role == Role::Error {
        let mut error = Output::Spdy(half.stream.sender);
        let why = Bytes::from_static(b"timed out waiting for streams");
        if error.send(why).await.is_ok() {
            let _told = error.finish().await.is_ok();
        }
    }
}

/// One forwarded connection, to its end.
async fn pair(
    backend: &dyn Backend,
    pod_id: &str,
    port: u16,
    from_client: Inbox,
    to_client: Output,
    mut error: Output,
) {
    match backend.port_forward(pod_id, port).await {
        Ok(socket) => {
            let (from_pod, to_pod) = tokio::io::split(socket);
            copy(from_client, to_client, from_pod, to_pod).await;
        }
        Err(why) => {
            tracing::debug!(pod_id, port, why, "a port could not be forwarded");
            let why = format!("error forwarding port {port} to pod {pod_id}: {why}");
            let told = error.send(why.into()).await.is_ok() && to_client.finish().await.is_ok();
            tracing::trace!(told, "told the client");
        }
    }
    let _told = error.finish().await.is_ok();
}

/// How one direction of a forwarded connection ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// The other may have something left.
    Half,
    /// Nobody wants the rest of the other.
    Whole,
}

async fn copy(
    mut from_client: Inbox,
    mut to_client: Output,
    mut from_pod: impl AsyncRead + Unpin,
    mut to_pod: impl AsyncWrite + Unpin,
) {
    let (said_all, silence) = tokio::sync::watch::channel(false);
    let outwards = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(PIECE);
            // A reset by the pod's program ends the connection like an end.
            let Ok(1..) = from_pod.read_buf(&mut buffer).await else {
                break;
            };
            if to_client.send(buffer.split().freeze()).await.is_err() {
                return Ended::Whole;
            }
        }
        said_all.send_replace(true);
        match to_client.finish().await {
            Ok(()) => Ended::Half,
            Err(Closed) => Ended::Whole,
        }
    };
    let inwards = async {
        let mut silence = silence;
        loop {
            let quiet = async {
                if silence.wait_for(|said| *said).await.is_ok() {
                    tokio::time::sleep(HALF_CLOSED).await;
                }
            };
            let data = tokio::select! {
                data = from_client.recv() => data,
                () = quiet => return Ended::Whole,
            };
            // Where the pod's program takes no more, there may still be
            // something from it to read.
            let more = match data {
                Ok(Some(data)) => to_pod.write_all(&data).await.is_ok(),
                Ok(None) => {
                    let _half_closed = to_pod.shutdown().await.is_ok();
                    false
                }
                // The client has reset the stream.
                Err(_) => return Ended::Whole,
            };
            if !more {
                return Ended::Half;
            }
        }
    };
    tokio::pin!(outwards, inwards);
    tokio::select! {
        ended = &mut outwards => if ended == Ended::Half {
            inwards.await;
        },
        ended = &mut inwards => if ended == Ended::Half {
            outwards.await;
        },
    }
}

/// The older form over WebSocket: the ports are those of the request, and each
/// has a channel for its bytes and one for its error, both of which begin with
/// the port as two bytes, the lower first.
pub async fn over_channels<IO>(
    io: IO,
    request: PortForwardRequest,
    backend: &Arc<dyn Backend>,
    idle: Duration,
) where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    let ports: Vec<(u8, u16)> = CHANNELS.step_by(2).zip(request.ports).collect();
    let readable = ports.iter().map(|(channel, _)| *channel);
    let mut channels = Channels::start(io, idle, readable, false);
    let gone = channels.connection.gone().clone();
    let mut pairs = JoinSet::new();
    for (number, port) in ports {
        let mut data = channels.channel(number);
        let mut error = channels.channel(number + 1);
        let Some(inbox) = channels.inbox(number) else {
            continue;
        };
        let (backend, pod_id) = (Arc::clone(backend), request.pod_id.clone());
        pairs.spawn(async move {
            let begin = Bytes::copy_from_slice(&port.to_le_bytes());
            if data.send(begin.clone()).await.is_ok() && error.send(begin).await.is_ok() {
                let (data, error) = (Output::Channel(data), Output::Channel(error));
                pair(&*backend, &pod_id, port, inbox, data, error).await;
            }
        });
    }
    let all = async { while pairs.join_next().await.is_some() {} };
    tokio::select! {
        () = gone.cancelled() => return,
        () = all => {}
    }
    channels.connection.close().await;
}
