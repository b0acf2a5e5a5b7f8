//! drupe-agent: PID 1 of a pod's guest.
//!
//! It mounts what the guest needs, tells the host that it is there, and then
//! serves the interface of `agent.proto` on vsock until it is told to switch
//! the guest off. One thread: everything slow is either a process of its own
//! or done in small steps.
//!
//! A library beside the program, because the supervisor of pods that share the
//! host's kernel (`drupe-shim`) serves the same interface: what is public is
//! what does not depend on who makes a container's processes, from their
//! streams to the users in their files.

mod boot;
pub mod cgroup;
pub mod clock;
pub mod container;
mod disk;
pub mod log;
mod network;
mod oom;
mod power;
mod raw_disk;
pub mod reaper;
mod rootfs;
pub mod sandbox;
pub mod server;
pub mod stats;
pub mod streams;
pub mod sys;
pub mod tree;
mod trim;
mod userns;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use agent_api::agent_server::AgentServer;
use agent_api::stream::STREAM_PORT;
use agent_api::{MAX_CALLS, MAX_MESSAGE_BYTES};
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use tonic::transport::Server;

use container::Containers;
use network::NetworkError;
use reaper::Reaper;
use server::{Service, sentence};

/// The guest's port that serves the interface (the VMM's `AGENT_PORT`).
const AGENT_PORT: u32 = 1024;
/// The host, and its port that waits for the agent (the VMM's `READY_PORT`).
const HOST_CID: u32 = 2;
const READY_PORT: u32 = 1;

/// How long the last answers may take to leave before the power goes.
const FAREWELL: Duration = Duration::from_millis(500);

#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("mounting")]
    Boot(#[from] boot::BootError),
    #[error("starting the runtime")]
    Runtime(#[source] io::Error),
    #[error("bringing up the loopback")]
    Loopback(#[source] NetworkError),
    #[error("listening on vsock port {port}")]
    Listen { port: u32, source: io::Error },
    #[error("telling the host on its vsock port {READY_PORT}")]
    Ready(#[source] io::Error),
    #[error("serving")]
    Serve(#[from] tonic::transport::Error),
}

/// What the program does; it does not come back.
pub fn main() -> ! {
    if std::process::id() != 1 {
        eprintln!(
            "drupe-agent {}: runs as PID 1 of a guest only",
            env!("CARGO_PKG_VERSION")
        );
        std::process::exit(2);
    }
    if let Err(error) = run() {
        power::say(&format!("failed while {}", sentence(&error)));
    }
    power::off()
}

fn run() -> Result<(), AgentError> {
    boot::mount_all()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::Runtime)?;
    runtime.block_on(serve())
}

async fn serve() -> Result<(), AgentError> {
    let reaper = Reaper::start().map_err(AgentError::Runtime)?;
    let containers = Containers::new(reaper).map_err(AgentError::Runtime)?;
    network::loopback_up().await.map_err(AgentError::Loopback)?;
    let calls = from_host(listen(AGENT_PORT)?);
    tokio::spawn(trim::keep());
    tokio::spawn(streams::serve(listen(STREAM_PORT)?, containers.sessions()));
    // Held until the end, for a host that wants to see it.
    let _ready = announce().await.map_err(AgentError::Ready)?;

    let shutdown = Arc::new(watch::Sender::new(false));
    let mut over = shutdown.subscribe();
    let mut farewell = shutdown.subscribe();
    let service = AgentServer::new(Service::new(containers, shutdown))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let serving = Server::builder()
        .max_concurrent_streams(MAX_CALLS)
        .add_service(service)
        .serve_with_incoming_shutdown(calls, async move {
            // The sender lives in the service.
            let _ = over.wait_for(|over| *over).await;
        });
    tokio::select! {
        served = serving => served?,
        () = async move {
            let _ = farewell.wait_for(|over| *over).await;
            // A client that keeps its connection open shall not keep the
            // guest.
            let _ = timeout(FAREWELL, std::future::pending::<()>()).await;
        } => {}
    }
    Ok(())
}

fn listen(port: u32) -> Result<VsockListener, AgentError> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .map_err(|source| AgentError::Listen { port, source })
}

/// Connections of the host's. Programs of the guest have no business here,
/// should its kernel know a way.
fn from_host(listener: VsockListener) -> impl Stream<Item = io::Result<VsockStream>> {
    listener.incoming().filter(|accepted| match accepted {
        Ok(stream) => stream.peer_addr().is_ok_and(|peer| is_host(&peer)),
        Err(_) => true,
    })
}

fn is_host(peer: &VsockAddr) -> bool {
    peer.cid() == HOST_CID
}

/// Connects to the host, which is the message, and says who is there.
async fn announce() -> io::Result<VsockStream> {
    let mut host = VsockStream::connect(VsockAddr::new(HOST_CID, READY_PORT)).await?;
    let line = concat!("drupe-agent ", env!("CARGO_PKG_VERSION"), "\n");
    match host.write_all(line.as_bytes()).await {
        // A host that has seen the connection needs no more of it.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(host),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(host),
        result => result.map(|()| host),
    }
}
