//! Calls to the agent in a pod's guest, each with a time-out and none
//! outliving the wish to stop the pod.

pub(crate) mod budget;
mod link;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::agent_client::AgentClient as Grpc;
use agent_api::stream::{ACCEPTED, HELLO_LEN, Hello, MAX_REFUSAL, REFUSED, STREAM_PORT};
use agent_api::{ContainerState, Event, ExecSyncEvent, ExecSyncRequest, Exit, SessionEvent};
use hyper_util::rt::TokioIo;
use oci_spec::runtime::LinuxResources;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Response, Status, Streaming};

use self::budget::Budget;
use self::link::Link;
use crate::faults::{self, Scope};
use crate::figures::Seen;
use crate::observer::Observer;
use crate::{Error, Result};
pub(crate) use vmm_client::plain;

/// A guest under load answers in milliseconds; one that takes this long hangs.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// Streams being dialled at once: of clients that have not said their port yet
/// the VMM drops the oldest when there are 128, and the guest's kernel refuses
/// connections when as many wait for the agent.
const DIALS_AT_ONCE: usize = 32;
/// A guest asked to power off syncs its disks first.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// Answers that say little or nothing, and what later versions may add. An
/// event has the text of an error, [`agent_api::MAX_ERROR_BYTES`] long.
const SMALL_BYTES: usize = 16 << 10;
/// A piece of a command's output is 64 KiB.
const OUTPUT_BYTES: usize = (64 << 10) + SMALL_BYTES;
/// Answers about all containers: for the guest itself.
const GUEST_BYTES: usize = 64 << 10;
/// And for each container: [`MAX_GROUPS`] and the text of an error; or some
/// thirty figures, and seven of each of its disks.
const STATE_BYTES: usize = 8 << 10;
const STATS_BYTES: usize = 4 << 10;
/// Of a container's user. An image would have to name one in as many groups.
const MAX_GROUPS: usize = 1024;

/// What the agent may send before it is read: of one call, and of all. Frames
/// wait in memory by then.
const STREAM_WINDOW_BYTES: u32 = 128 << 10;
const LINK_WINDOW_BYTES: u32 = 512 << 10;

/// A connection to one agent, made again when it breaks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AgentClient {
    grpc: Grpc<Channel>,
    vsock: Arc<PathBuf>,
    dials: Arc<Semaphore>,
    /// Apart, because what a pod's own server does not accept may take long.
    forwards: Arc<Semaphore>,
    stopping: CancellationToken,
    observer: Arc<dyn Observer>,
    budget: Arc<Budget>,
    seen: Arc<Mutex<Seen>>,
    scope: Option<Scope>,
}

impl AgentClient {
    /// A client that knows of no containers.
    #[must_use]
    pub fn new(vsock: PathBuf, stopping: CancellationToken, observer: Arc<dyn Observer>) -> Self {
        let budget = Budget::new(budget::Shared::default());
        Self::of_pod(vsock, stopping, observer, budget, None)
    }

    /// `scope` is whose fault a panic over the guest's answers is.
    pub(crate) fn of_pod(
        vsock: PathBuf,
        stopping: CancellationToken,
        observer: Arc<dyn Observer>,
        budget: Budget,
        scope: Option<Scope>,
    ) -> Self {
        let (vsock, budget) = (Arc::new(vsock), Arc::new(budget));
        let (socket, paid) = (Arc::clone(&vsock), Arc::clone(&budget));
        let connect = tower::service_fn(move |_: Uri| {
            let (socket, paid) = (Arc::clone(&socket), Arc::clone(&paid));
            async move {
                let stream =
                    vmm_client::dial_vsock(&socket, vmm_client::protocol::AGENT_PORT).await?;
                Ok::<_, vmm_client::DialError>(TokioIo::new(Link::new(stream, paid)))
            }
        });
        // The address is never resolved: the connector dials the pod's vsock.
        let channel = Endpoint::from_static("http://agent")
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(LINK_WINDOW_BYTES)
            .executor(faults::Executor(scope.clone()))
            .connect_with_connector_lazy(connect);
        Self {
            grpc: Grpc::new(channel),
            vsock,
            dials: Arc::new(Semaphore::new(DIALS_AT_ONCE)),
            forwards: Arc::new(Semaphore::new(DIALS_AT_ONCE)),
            stopping,
            observer,
            budget,
            seen: Arc::default(),
            scope,
        }
    }

    /// What was told of the pod before.
    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Marks what is done with the guest's words as the pod's.
    pub(crate) fn in_scope<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        faults::in_scope(self.scope.clone(), work)
    }

    /// For a call whose answer has `bytes` at most.
    fn within(&self, bytes: usize) -> Grpc<Channel> {
        self.grpc.clone().max_decoding_message_size(bytes)
    }

    /// The pod is being stopped.
    pub(crate) async fn stopped(&self) {
        self.stopping.cancelled().await;
    }

    /// A raw stream to the guest that its agent has accepted; `refused` makes
    /// an error of the agent's reason.
    pub(crate) async fn stream(
        &self,
        hello: Hello,
        refused: impl FnOnce(String) -> Error,
    ) -> Result<UnixStream> {
        let broken = |source| Error::Stream { source };
        let places = match hello {
            Hello::Session { .. } => &self.dials,
            Hello::Forward { .. } => &self.forwards,
        };
        let dial = async {
            // The semaphore is never closed.
            let _place = places.acquire().await.map_err(|_| Error::Stopping)?;
            let mut stream = vmm_client::dial_vsock(&self.vsock, STREAM_PORT).await?;
            let bytes: [u8; HELLO_LEN] = hello.encode();
            stream.write_all(&bytes).await.map_err(broken)?;
            match stream.read_u8().await.map_err(broken)? {
                ACCEPTED => Ok(stream),
                REFUSED => {
                    let mut why = Vec::new();
                    let mut text = stream.take(MAX_REFUSAL as u64);
                    text.read_to_end(&mut why).await.map_err(broken)?;
                    Err(refused(plain(&String::from_utf8_lossy(&why))))
                }
                _ => Err(Error::Protocol {
                    call: "a stream",
                    why: "its answer is neither yes nor no",
                }),
            }
        };
        tokio::select! {
            () = self.stopping.cancelled() => Err(Error::Stopping),
            stream = dial => stream,
        }
    }

    pub(crate) async fn begin_exec(
        &self,
        request: agent_api::ExecRequest,
    ) -> Result<Streaming<SessionEvent>> {
        self.call("Exec", CALL_TIMEOUT, self.within(SMALL_BYTES).exec(request))
            .await
    }

    pub(crate) async fn begin_attach(
        &self,
        request: agent_api::AttachRequest,
    ) -> Result<Streaming<SessionEvent>> {
        self.call(
            "Attach",
            CALL_TIMEOUT,
            self.within(SMALL_BYTES).attach(request),
        )
        .await
    }

    pub(crate) async fn resize(&self, request: agent_api::ResizeRequest) -> Result<()> {
        self.call(
            "Resize",
            CALL_TIMEOUT,
            self.within(SMALL_BYTES).resize(request),
        )
        .await?;
        Ok(())
    }

    pub async fn configure(&self, request: agent_api::ConfigureSandboxRequest) -> Result<()> {
        self.call(
            "ConfigureSandbox",
            CALL_TIMEOUT,
            self.within(SMALL_BYTES).configure_sandbox(request),
        )
        .await?;
        Ok(())
    }

    /// Returns the state of the new container.
    pub async fn create(
        &self,
        request: agent_api::CreateContainerRequest,
    ) -> Result<Option<agent_api::ContainerState>> {
        let id = request.id.clone();
        let mut grpc = self.within(SMALL_BYTES);
        let call = grpc.create_container(request);
        let reply = self.call("CreateContainer", CALL_TIMEOUT, call).await?;
        Ok(reply.state.filter(|state| state.id == id).map(cut))
    }

    /// Returns when it started, in nanoseconds since the epoch.
    pub async fn start(&self, id: &str) -> Result<i64> {
        let request = agent_api::StartContainerRequest { id: id.to_owned() };
        let reply = self
            .call(
                "StartContainer",
                CALL_TIMEOUT,
                self.within(SMALL_BYTES).start_container(request),
            )
            .await?;
        Ok(reply.started_at_unix_nanos)
    }

    pub async fn signal(&self, id: &str, signal: u32, all: bool) -> Result<()> {
        let request = agent_api::SignalContainerRequest {
            id: id.to_owned(),
            signal,
            all,
        };
        self.call(
            "SignalContainer",
            CALL_TIMEOUT,
            self.within(SMALL_BYTES).signal_container(request),
        )
        .await?;
        Ok(())
    }

    pub async fn remove(&self, id: &str) -> Result<()> {
        let request = agent_api::RemoveContainerRequest { id: id.to_owned() };
        self.call(
            "RemoveContainer",
            CALL_TIMEOUT,
            self.within(SMALL_BYTES).remove_container(request),
        )
        .await?;
        Ok(())
    }

    /// The pod's containers, each once, whatever else the guest names.
    pub async fn list(&self) -> Result<Vec<ContainerState>> {
        let bytes = GUEST_BYTES + STATE_BYTES * self.budget.containers();
        let mut grpc = self.within(bytes);
        let call = self.large(
            bytes,
            grpc.list_containers(agent_api::ListContainersRequest {}),
        );
        let reply = self.call("ListContainers", CALL_TIMEOUT, call).await?;
        let all = reply.containers.into_iter();
        let known = all.filter(|state| self.budget.knows(&state.id));
        let once: BTreeMap<String, ContainerState> =
            known.map(|state| (state.id.clone(), cut(state))).collect();
        Ok(once.into_values().collect())
    }

    /// `resources` are those of the OCI runtime spec; what they do not name
    /// stays.
    pub async fn update(
        &self,
        id: &str,
        resources: &LinuxResources,
        oom_score_adj: Option<i32>,
    ) -> Result<()> {
        let request = agent_api::UpdateContainerRequest {
            id: id.to_owned(),
            resources: serde_json::to_vec(resources).map_err(oci_spec::OciSpecError::SerDe)?,
            oom_score_adj,
        };
        self.call(
            "UpdateContainer",
            CALL_TIMEOUT,
            self.within(SMALL_BYTES).update_container(request),
        )
        .await?;
        Ok(())
    }

    /// What the guest says of itself and of all of its containers.
    pub async fn stats(&self) -> Result<agent_api::StatsResponse> {
        let bytes = GUEST_BYTES + STATS_BYTES * self.budget.containers();
        let mut grpc = self.within(bytes);
        let call = self.large(bytes, grpc.stats(agent_api::StatsRequest::default()));
        self.call("Stats", CALL_TIMEOUT, call).await
    }

    pub async fn exec_sync(&self, request: ExecSyncRequest) -> Result<Streaming<ExecSyncEvent>> {
        self.call(
            "ExecSync",
            CALL_TIMEOUT,
            self.within(OUTPUT_BYTES).exec_sync(request),
        )
        .await
    }

    pub async fn events(&self) -> Result<Streaming<Event>> {
        let request = agent_api::EventsRequest {};
        self.call(
            "Events",
            CALL_TIMEOUT,
            self.within(SMALL_BYTES).events(request),
        )
        .await
    }

    /// Not ended by the wish to stop: it is part of stopping.
    pub async fn shutdown(&self) -> Result<()> {
        let mut grpc = self.within(SMALL_BYTES);
        let call = grpc.shutdown(Request::new(agent_api::ShutdownRequest {}));
        self.answer("Shutdown", SHUTDOWN_TIMEOUT, call).await?;
        Ok(())
    }

    /// A call for which there is to be room before it is made. The time that
    /// this takes is the call's.
    async fn large<T>(
        &self,
        bytes: usize,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> std::result::Result<Response<T>, Status> {
        let _room = self.budget.large_answer(bytes).await;
        call.await
    }

    async fn call<T>(
        &self,
        name: &'static str,
        limit: Duration,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        tokio::select! {
            () = self.stopping.cancelled() => Err(Error::Stopping),
            reply = self.answer(name, limit, call) => reply,
        }
    }

    async fn answer<T>(
        &self,
        name: &'static str,
        limit: Duration,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        let call = self.in_scope(call);
        match tokio::time::timeout(limit, call).await {
            Err(_) => {
                self.observer.agent_failed(Code::DeadlineExceeded);
                Err(timeout(name, limit))
            }
            Ok(Err(status)) => {
                self.observer.agent_failed(status.code());
                Err(refused(name, &status))
            }
            Ok(Ok(response)) => Ok(response.into_inner()),
        }
    }
}

fn timeout(call: &'static str, limit: Duration) -> Error {
    Error::AgentTimeout {
        call,
        seconds: limit.as_secs(),
    }
}

/// The guest's words are hostile: they are cut before they reach a log or a
/// client.
pub(crate) fn refused(call: &'static str, status: &Status) -> Error {
    let message = plain(status.message());
    // A status that was made on this side has the transport's error as source.
    if std::error::Error::source(status).is_some() {
        return Error::AgentLink { call, message };
    }
    Error::Agent {
        call,
        code: status.code(),
        message,
    }
}

/// What of a container's state is kept.
fn cut(mut state: ContainerState) -> ContainerState {
    state.supplemental_groups.truncate(MAX_GROUPS);
    state.supplemental_groups.shrink_to_fit();
    state.exit = state.exit.map(cut_exit);
    state
}

pub(crate) fn cut_exit(exit: Exit) -> Exit {
    Exit {
        start_error: plain(&exit.start_error),
        ..exit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Step;
    use crate::observer::{MachineEnd, NotStarted};

    /// Codes in the order in which they were told.
    #[derive(Debug, Default)]
    struct Told(Mutex<Vec<Code>>);

    impl Observer for Told {
        fn pod_started(&self, _: &str, _: &[(Step, Duration)], _: Duration) {}
        fn pod_not_started(&self, _: &str, _: NotStarted) {}
        fn machine_ended(&self, _: MachineEnd) {}
        fn agent_failed(&self, code: Code) {
            self.0.lock().unwrap().push(code);
        }
    }

    #[tokio::test]
    async fn a_call_that_fails_is_told_and_one_that_a_stop_ends_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (told, stopping) = (Arc::new(Told::default()), CancellationToken::new());
        let agent = AgentClient::new(dir.path().join("gone"), stopping.clone(), told.clone());
        let error = agent.list().await.unwrap_err();
        assert!(matches!(error, Error::AgentLink { .. }), "{error}");
        assert_eq!(*told.0.lock().unwrap(), [Code::Unavailable]);

        // It takes what comes and does not answer.
        let path = dir.path().join("mute");
        let _mute = tokio::net::UnixListener::bind(&path).unwrap();
        let agent = AgentClient::new(path, stopping.clone(), told.clone());
        let (listed, ()) = tokio::join!(agent.list(), async { stopping.cancel() });
        assert!(matches!(listed, Err(Error::Stopping)));
        assert_eq!(told.0.lock().unwrap().len(), 1);
    }
}
