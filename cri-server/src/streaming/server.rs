//! HTTP/1.1: takes a token, answers the upgrade, and hands the connection to
//! its protocol.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT,
    SEC_WEBSOCKET_PROTOCOL, UPGRADE,
};
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::handshake::{self, Agreed, Kind, Protocol, Refusal, Remote};
use super::remote_command::{self, ClientStreams, Output};
use super::session::{Backend, PortForwardRequest, Session, Wanted};
use super::token::{Ticket, Tokens};
use super::websocket::Channels;
use super::{StreamingError, TlsFiles, port_forward, spdy, websocket};
use crate::lobby::{Lobby, Peer};

/// For connections that have not shown a token yet.
pub(super) const PLACES: usize = 256;
/// A client that has connected has something to say: this is for a machine that
/// is slow.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 10 });
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// For all of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Before the next try when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A peer whose machine is gone is noticed after about a minute and a half.
const KEEPALIVE_IDLE_SECONDS: u32 = 30;
const KEEPALIVE_INTERVAL_SECONDS: u32 = 10;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

pub struct Served {
    pub tokens: Arc<Tokens>,
    pub backend: Arc<dyn Backend>,
    pub idle: Duration,
}

pub fn tls(files: &TlsFiles) -> Result<TlsAcceptor, StreamingError> {
    let failed = |why: String| StreamingError::Tls {
        cert: files.cert.clone(),
        key: files.key.clone(),
        why,
    };
    let chain = CertificateDer::pem_file_iter(&files.cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| failed(format!("the certificate: {error}")))?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| failed(format!("the key: {error}")))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| failed(error.to_string()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves until dropped; with it, all of its connections end.
pub async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, served: Served) {
    let served = Arc::new(served);
    let lobby = Arc::new(Lobby::new(PLACES));
    let mut connections = JoinSet::new();
    loop {
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot take a streaming connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(error) = prepare(&stream) {
            tracing::debug!(%error, "a streaming connection is gone already");
            continue;
        }
        let peer = Peer::of(&stream, remote);
        let place = lobby.enter(peer).await;
        while connections.try_join_next().is_some() {}
        let (served, tls) = (Arc::clone(&served), tls.clone());
        connections.spawn(async move {
            let session = tokio::select! {
                session = welcome(stream, tls, &served) => session,
                () = place.is_wanted() => {
                    tracing::debug!(?peer, "a streaming client that had shown no token gave way to others");
                    None
                }
            };
            // It has shown its token.
            drop(place);
            if let Some((upgraded, granted)) = session {
                serve(upgraded, granted, &served).await;
            }
        });
    }
}

/// What a client shows of itself until it has a session; `None` when it came to
/// nothing.
async fn welcome(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    served: &Arc<Served>,
) -> Option<(Upgraded, Granted)> {
    let spoken = tokio::time::timeout(FIRST_BYTE_TIMEOUT, stream.peek(&mut [0])).await;
    if !matches!(spoken, Ok(Ok(1..))) {
        tracing::debug!(?spoken, "a streaming client said nothing");
        return None;
    }
    let Some(tls) = tls else {
        return greet(stream, served).await;
    };
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => greet(stream, served).await,
        Ok(Err(error)) => {
            tracing::debug!(%error, "no TLS with a streaming client");
            None
        }
        Err(_) => {
            tracing::debug!("a streaming client did not finish its TLS handshake");
            None
        }
    }
}

/// A whole connection of a client that is here already.
#[cfg(any(test, feature = "hostile"))]
pub async fn converse<IO>(io: IO, served: Arc<Served>)
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    if let Some((upgraded, granted)) = greet(io, &served).await {
        serve(upgraded, granted, &served).await;
    }
}

fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_SECONDS)?;
    setsockopt(
        stream,
        sockopt::TcpKeepInterval,
        &KEEPALIVE_INTERVAL_SECONDS,
    )?;
    Ok(())
}

/// What a client showed a token for, and how it wants it.
struct Granted {
    ticket: Ticket,
    protocol: Protocol,
}

type Answer = Response<Full<Bytes>>;

/// One request; `None` when it came to nothing.
async fn greet<IO>(io: IO, served: &Arc<Served>) -> Option<(Upgraded, Granted)>
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let service = service_fn(|mut request: Request<Incoming>| {
        let (answer, granted) = match grant(&request, &served.tokens) {
            Ok((answer, granted)) => (answer, Some(granted)),
            Err(answer) => (*answer, None),
        };
        if let Some(granted) = granted {
            // One request a connection: there is room.
            let upgrade: OnUpgrade = hyper::upgrade::on(&mut request);
            let _first = tell.try_send((upgrade, granted)).is_ok();
        }
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(%error, "no streaming request was read");
        return None;
    }
    let (upgrade, granted) = told.try_recv().ok()?;
    match upgrade.await {
        Ok(upgraded) => Some((upgraded, granted)),
        Err(error) => {
            tracing::debug!(%error, "a streaming client left during the upgrade");
            None
        }
    }
}

/// Takes the token only when the rest is agreed, so that a client may try
/// another protocol at the same address.
fn grant(request: &Request<Incoming>, tokens: &Tokens) -> Result<(Answer, Granted), Box<Answer>> {
    let (kind, token) = handshake::parse_path(request.uri().path())
        .ok_or_else(|| refuse(StatusCode::NOT_FOUND, "no such address".to_owned()))?;
    if ![Method::GET, Method::POST].contains(request.method()) {
        let why = "streaming requests are GET or POST".to_owned();
        return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, why));
    }
    let agreed = handshake::agree(kind, request.headers()).map_err(|why| refuse_upgrade(&why))?;
    let ticket = tokens.take(token);
    let ticket = ticket.filter(|ticket| {
        matches!(
            (ticket, kind),
            (Ticket::Exec(_), Kind::Exec)
                | (Ticket::Attach(_), Kind::Attach)
                | (Ticket::PortForward(_), Kind::PortForward)
        )
    });
    let ticket = ticket.ok_or_else(|| {
        let why = "the token is unknown, used, or older than a minute".to_owned();
        refuse(StatusCode::NOT_FOUND, why)
    })?;
    let protocol = agreed.protocol;
    Ok((switch(agreed), Granted { ticket, protocol }))
}

fn switch(agreed: Agreed) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let name = match agreed.accept.map(|accept| accept.parse()) {
        Some(Ok(accept)) => {
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
            SEC_WEBSOCKET_PROTOCOL
        }
        // Base64 is a header's value always.
        Some(Err(_)) | None => {
            headers.insert(UPGRADE, HeaderValue::from_static("SPDY/3.1"));
            handshake::PROTOCOL_VERSION
        }
    };
    if let Some(protocol) = agreed.name {
        headers.insert(name, HeaderValue::from_static(protocol));
    }
    answer
}

fn refuse(status: StatusCode, why: String) -> Box<Answer> {
    let mut answer = Response::new(Full::from(why + "\n"));
    *answer.status_mut() = status;
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, text);
    let close = HeaderValue::from_static("close");
    answer.headers_mut().insert(CONNECTION, close);
    Box::new(answer)
}

fn refuse_upgrade(why: &Refusal) -> Box<Answer> {
    let Refusal::Unsupported { supported, .. } = why else {
        return refuse(StatusCode::BAD_REQUEST, why.to_string());
    };
    let mut answer = refuse(StatusCode::FORBIDDEN, why.to_string());
    for protocol in supported {
        let name: HeaderName = handshake::ACCEPTED_VERSIONS;
        answer
            .headers_mut()
            .append(name, HeaderValue::from_static(protocol));
    }
    answer
}

async fn serve(upgraded: Upgraded, granted: Granted, served: &Served) {
    let io = TokioIo::new(upgraded);
    let backend = &served.backend;
    match granted.ticket {
        Ticket::Exec(request) => {
            let wanted = request.wanted;
            let session = backend.exec(request);
            remote(io, granted.protocol, wanted, session, served.idle).await;
        }
        Ticket::Attach(request) => {
            let wanted = request.wanted;
            let session = backend.attach(request);
            remote(io, granted.protocol, wanted, session, served.idle).await;
        }
        Ticket::PortForward(request) => {
            forward(io, granted.protocol, request, backend, served.idle).await;
        }
    }
}

async fn remote<IO>(
    io: IO,
    protocol: Protocol,
    wanted: Wanted,
    session: impl Future<Output = Result<Session, String>>,
    idle: Duration,
) where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    match protocol {
        Protocol::SpdyRemote(version) => {
            let mut connection = spdy::Connection::start(io, idle);
            let client = remote_command::collect(&mut connection, wanted, version.resizes).await;
            let Some(client) = client else {
                return;
            };
            let gone = connection.gone().clone();
            tokio::select! {
                () = gone.cancelled() => return,
                () = remote_command::run(session, client, version.status) => {}
            }
            connection.close().await;
        }
        Protocol::WebSocketRemote(version) => {
            let (channels, client) = open_channels(io, wanted, version, idle).await;
            let gone = channels.connection.gone().clone();
            tokio::select! {
                () = gone.cancelled() => return,
                () = remote_command::run(session, client, version.status) => {}
            }
            channels.connection.close().await;
        }
        Protocol::SpdyPortForward | Protocol::WebSocketTunnel | Protocol::WebSocketPorts => {
            tracing::error!(?protocol, "not a protocol for exec or attach");
        }
    }
}

async fn open_channels<IO>(
    io: IO,
    wanted: Wanted,
    version: Remote,
    idle: Duration,
) -> (Channels, ClientStreams)
where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    let resizes = wanted.tty && version.resizes;
    let readable = [(STDIN, wanted.stdin), (RESIZE, resizes)];
    let readable = readable
        .into_iter()
        .filter_map(|(number, wanted)| wanted.then_some(number));
    let mut channels = Channels::start(io, idle, readable, version.close_signal);
    // Clients take an empty message for the sign that the connection stands.
    let first = match wanted {
        Wanted { stdout: true, .. } => STDOUT,
        Wanted { stderr: true, .. } => STDERR,
        _ => ERROR,
    };
    if channels.channel(first).send(Bytes::new()).await.is_err() {
        channels.connection.gone().cancel();
    }
    let output = |number| Output::Channel(channels.channel(number));
    let client = ClientStreams {
        stdout: wanted.stdout.then(|| output(STDOUT)),
        stderr: wanted.stderr.then(|| output(STDERR)),
        error: output(ERROR),
        stdin: None,
        resize: None,
        silent: Vec::new(),
    };
    let client = ClientStreams {
        stdin: channels.inbox(STDIN),
        resize: channels.inbox(RESIZE),
        ..client
    };
    (channels, client)
}

async fn forward<IO>(
    io: IO,
    protocol: Protocol,
    request: PortForwardRequest,
    backend: &Arc<dyn Backend>,
    idle: Duration,
) where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    match protocol {
        Protocol::SpdyPortForward => {
            let connection = spdy::Connection::start(io, idle);
            port_forward::over_spdy(connection, backend, &request.pod_id).await;
        }
        Protocol::WebSocketTunnel => {
            let connection = spdy::Connection::start(websocket::tunnel(io, idle), idle);
            port_forward::over_spdy(connection, backend, &request.pod_id).await;
        }
        Protocol::WebSocketPorts => {
            port_forward::over_channels(io, request, backend, idle).await;
        }
        Protocol::SpdyRemote(_) | Protocol::WebSocketRemote(_) => {
            tracing::error!(?protocol, "not a protocol for forwarded ports");
        }
    }
}
