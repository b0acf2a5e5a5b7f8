//! HTTP/1.1 for scrapes: `GET /metrics`, one request a connection.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use super::MetricsConfig;
use crate::lobby::{Lobby, Peer};

const PATH: &str = "/metrics";
/// Prometheus's text format, as OpenMetrics has standardised it.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// Scrapes at once, and connections that want something else; a node has one or two scrapers.
const MAX_CONNECTIONS: usize = 16;
/// From the connection to the last byte of the answer, which is Prometheus's
/// own limit.
const LIMIT: Duration = Duration::from_secs(10);
const MAX_HEADER_BYTES: usize = 16 << 10;
/// Before the next try when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    #[error("metrics.address: cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        source: std::io::Error,
    },
}

/// None where metrics are off.
pub async fn listen(config: &MetricsConfig) -> Result<Option<TcpListener>, MetricsError> {
    let Some(address) = config.address else {
        return Ok(None);
    };
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Some(listener)),
        Err(source) => Err(MetricsError::Listen { address, source }),
    }
}

/// Serves until dropped.
#[derive(Debug)]
pub struct Server(JoinHandle<()>);

impl Server {
    pub fn start(listener: TcpListener, registry: Registry) -> Self {
        Self(tokio::spawn(accept(listener, Arc::new(registry))))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn accept(listener: TcpListener, registry: Arc<Registry>) {
    let lobby = Arc::new(Lobby::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection for metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let peer = Peer::of(&stream, remote);
        let place = lobby.enter(peer).await;
        while connections.try_join_next().is_some() {}
        let registry = Arc::clone(&registry);
        connections.spawn(async move {
            tokio::select! {
                served = tokio::time::timeout(LIMIT, serve(stream, &registry)) => {
                    if served.is_err() {
                        tracing::debug!("a scrape took longer than {} s", LIMIT.as_secs());
                    }
                }
                () = place.is_wanted() => {
                    tracing::debug!(?peer, "a connection for metrics gave way to others");
                }
            }
        });
    }
}

pub(super) async fn serve<IO>(io: IO, registry: &Registry)
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = service_fn(|request: Request<_>| {
        let answer = answer(&request, registry);
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    // LIMIT holds for all of the connection, its head too.
    let connection = hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .header_read_timeout(None)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(io), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "no scrape was served");
    }
}

fn answer<B>(request: &Request<B>, registry: &Registry) -> Response<Full<Bytes>> {
    if request.uri().path() != PATH {
        let why = format!("there is only {PATH}\n");
        return respond(StatusCode::NOT_FOUND, TEXT, why);
    }
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let why = "only GET and HEAD\n".to_owned();
        let mut answer = respond(StatusCode::METHOD_NOT_ALLOWED, TEXT, why);
        let allowed = HeaderValue::from_static("GET, HEAD");
        answer.headers_mut().insert(ALLOW, allowed);
        return answer;
    }
    let mut text = String::new();
    match encode(&mut text, registry) {
        Ok(()) => respond(StatusCode::OK, OPENMETRICS, text),
        Err(error) => {
            tracing::error!(%error, "metrics cannot be written down");
            let why = "metrics cannot be written down\n".to_owned();
            respond(StatusCode::INTERNAL_SERVER_ERROR, TEXT, why)
        }
    }
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::from(body));
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static(kind);
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}
