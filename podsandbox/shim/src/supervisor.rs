//! Puts the parts together and waits for the pod's end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent_api::agent_server::AgentServer;
use agent_api::{MAX_CALLS, MAX_MESSAGE_BYTES};
use drupe_agent::reaper::Reaper;
use drupe_vmm::logs::LogService;
use nix::sys::prctl::set_child_subreaper;
use nix::unistd::{dup2_stdin, dup2_stdout};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use vmm_client::protocol::{EndCause, VmState};

use crate::control::{Control, ready};
use crate::error::Error;
use crate::links;
use crate::pod::{Containers, Parts};
use crate::server::Service;

/// How long the last answers may take to leave.
const FAREWELL: Duration = Duration::from_millis(500);

pub struct Options {
    pub pod: String,
    pub dir: PathBuf,
    pub runtime: PathBuf,
    pub cgroup: PathBuf,
    pub etc: PathBuf,
    pub host_network: bool,
}

pub fn run(options: Options) -> Result<(), Error> {
    let begin = |action| {
        move |source: io::Error| Error::File {
            action,
            path: "/proc/self".into(),
            source,
        }
    };
    // What the OCI runtime leaves is ours to wait for.
    set_child_subreaper(true).map_err(|e| begin("become the reaper of")(e.into()))?;
    let (control, streams) = listeners().map_err(begin("take the sockets of"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(begin("start the runtime of"))?;
    let served = runtime.block_on(serve(options, control, streams));
    // A walk over a container's files, or a disk that hangs, is not waited for.
    runtime.shutdown_background();
    served
}

/// The listening sockets, which came as standard input and output.
fn listeners() -> io::Result<(OwnedFd, OwnedFd)> {
    let control = io::stdin().as_fd().try_clone_to_owned()?;
    let streams = io::stdout().as_fd().try_clone_to_owned()?;
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    Ok((control, streams))
}

async fn serve(options: Options, control_socket: OwnedFd, streams: OwnedFd) -> Result<(), Error> {
    let failed = |action| {
        let path = options.dir.clone();
        move |source| Error::File {
            action,
            path,
            source,
        }
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("serve"))?;
    let reaper = Reaper::start().map_err(failed("serve"))?;
    let logs = LogService::start(|| Ok(())).map_err(failed("log for"))?;
    let containers = Containers::new(Parts {
        dir: options.dir.clone(),
        program: options.runtime.clone(),
        cgroup: options.cgroup.clone(),
        etc: options.etc.clone(),
        host_network: options.host_network,
        logs: logs.clone(),
        reaper,
    })?;
    let shutdown = Arc::new(watch::Sender::new(false));
    let status = Arc::new(watch::Sender::new(ready()));
    let streams = std::os::unix::net::UnixListener::from(streams);
    streams
        .set_nonblocking(true)
        .map_err(failed("listen for"))?;
    let streams = UnixListener::from_std(streams).map_err(failed("listen for"))?;
    let calls = links::serve(streams, containers.inner.sessions.clone());
    let service = AgentServer::new(Service::new(containers.clone(), shutdown.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let calls = Server::builder()
        .max_concurrent_streams(MAX_CALLS)
        .add_service(service)
        .serve_with_incoming(ReceiverStream::new(calls));
    // On their own, so that answers under way at the end still leave.
    let calls = tokio::spawn(calls);
    let control = Control {
        logs: logs.clone(),
        status: status.clone(),
        shutdown: shutdown.clone(),
    };
    let control = tokio::spawn(control.serve(control_socket));

    let mut over = shutdown.subscribe();
    let (cause, reason) = tokio::select! {
        served = calls => {
            (EndCause::Fault, format!("its calls are not served any more: {served:?}"))
        }
        served = control => {
            (EndCause::Fault, format!("its control socket is not served any more: {served:?}"))
        }
        _ = terminate.recv() => (EndCause::Killed, "its supervisor was told to end".to_owned()),
        // The sender lives above.
        _ = over.wait_for(|over| *over) => (EndCause::Killed, "it was ended on request".to_owned()),
    };
    tracing::info!(pod = options.pod, reason, "the pod ends");
    // Nothing that the pod has started outlives it.
    containers.kill_all().await;
    drop(containers.inner.pause.lock().await.take());
    status.send_modify(|status| status.state = VmState::Ended { reason, cause });
    // Answers under way, and the word to subscribers.
    let rest = timeout(FAREWELL, status.closed());
    drop(rest.await);
    let finished = tokio::task::spawn_blocking(move || logs.finish()).await?;
    Ok(finished?)
}
