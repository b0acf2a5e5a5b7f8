//! The HTTP server behind Exec, Attach and PortForward.
//!
//! The RPC leaves a request here and gets an address with a token ([`token`]);
//! a client, usually the kubelet on behalf of kubectl, comes to that address
//! ([`server`]), changes the connection to SPDY/3.1 ([`spdy`]) or WebSocket
//! ([`websocket`]), and is served by [`remote_command`] or [`port_forward`].
//! These know the pods by the trait [`session::Backend`] only.
//!
//! ```text
//!  client ── TCP ──► reader ──► Inbox (bounded) ──► stdin of the process
//!                      │
//!  client ◄── TCP ── writer ◄── Outbox (a few frames) ◄── stdout, stderr
//! ```
//! Nothing is read from a side before the other took what came earlier, so a
//! slow side holds the other up and memory stays bounded. When the client is
//! gone, the session is dropped, and with it what it started.

mod activity;
mod backend;
mod handshake;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
mod inbox;
mod outbox;
mod port_forward;
mod remote_command;
mod server;
mod session;
mod spdy;
mod status;
#[cfg(test)]
mod tests;
mod token;
mod websocket;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

pub use session::{AttachRequest, ExecRequest, PortForwardRequest, Wanted};
pub use token::TooManyTokens;

use session::Backend;
use token::{Ticket, Tokens};

/// What the largest piece of a stream is that is held in memory as one.
const PIECE: usize = 64 << 10;
/// A client has this long to open the streams it announced, as the kubelet
/// gives it.
const STREAM_CREATION: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StreamingConfig {
    pub address: SocketAddr,
    pub idle_timeout_seconds: u64,
    pub tls: Option<TlsFiles>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Default for StreamingConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            // The kubelet's own.
            idle_timeout_seconds: 4 * 60 * 60,
            tls: None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StreamingError {
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("cannot use the certificate {cert:?} with the key {key:?}: {why}")]
    Tls {
        cert: PathBuf,
        key: PathBuf,
        why: String,
    },
}

/// The running server, as the RPCs see it. Dropping it ends the server and all
/// of its sessions.
pub struct Streaming {
    tokens: Arc<Tokens>,
    base: String,
    accepting: tokio::task::JoinHandle<()>,
}

impl Streaming {
    pub async fn start(
        config: &StreamingConfig,
        backend: impl Backend,
    ) -> Result<Self, StreamingError> {
        let tls = config.tls.as_ref().map(server::tls).transpose()?;
        let listen = |source| StreamingError::Listen {
            address: config.address,
            source,
        };
        let listener = TcpListener::bind(config.address).await.map_err(listen)?;
        let address = reachable(listener.local_addr().map_err(listen)?);
        let scheme = if tls.is_some() { "https" } else { "http" };
        let tokens = Arc::new(Tokens::default());
        let served = server::Served {
            tokens: Arc::clone(&tokens),
            backend: Arc::new(backend),
            idle: Duration::from_secs(config.idle_timeout_seconds),
        };
        Ok(Self {
            tokens,
            base: format!("{scheme}://{address}"),
            accepting: tokio::spawn(server::accept(listener, tls, served)),
        })
    }

    /// The address at which `request` is carried out, once, within a minute.
    pub fn exec(&self, request: ExecRequest) -> Result<String, TooManyTokens> {
        self.url("exec", Ticket::Exec(request))
    }

    /// As [`Self::exec`].
    pub fn attach(&self, request: AttachRequest) -> Result<String, TooManyTokens> {
        self.url("attach", Ticket::Attach(request))
    }

    /// As [`Self::exec`].
    pub fn port_forward(&self, request: PortForwardRequest) -> Result<String, TooManyTokens> {
        self.url("portforward", Ticket::PortForward(request))
    }

    fn url(&self, kind: &str, ticket: Ticket) -> Result<String, TooManyTokens> {
        let token = self.tokens.insert(ticket)?;
        Ok(format!("{}/{kind}/{token}", self.base))
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A server on every address is told by the one that the kubelet, which is on
/// the same node, can dial.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
