//! The agent's gRPC service: converts, calls, maps the error.

use std::pin::Pin;
use std::sync::Arc;

use agent_api::agent_server::Agent;
use agent_api::{
    AttachRequest, ConfigureSandboxRequest, ConfigureSandboxResponse, CreateContainerRequest,
    CreateContainerResponse, Event, EventsRequest, ExecRequest, ExecSyncEvent, ExecSyncRequest,
    ListContainersRequest, ListContainersResponse, RemoveContainerRequest, RemoveContainerResponse,
    ResizeRequest, ResizeResponse, SessionEvent, SetTimeRequest, SetTimeResponse, ShutdownRequest,
    ShutdownResponse, SignalContainerRequest, SignalContainerResponse, StartContainerRequest,
    StartContainerResponse, StatsRequest, StatsResponse, UpdateContainerRequest,
    UpdateContainerResponse,
};
use futures_util::{Stream, StreamExt};
use tokio::sync::watch;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream};
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::pod::Containers;
use crate::sandbox::Sandbox;
use crate::stats;

type Reply<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub struct Service {
    sandbox: Sandbox,
    containers: Containers,
    /// Turned true when the pod is to end.
    shutdown: Arc<watch::Sender<bool>>,
}

impl Service {
    pub fn new(containers: Containers, shutdown: Arc<watch::Sender<bool>>) -> Self {
        Self {
            sandbox: Sandbox::default(),
            containers,
            shutdown,
        }
    }
}

#[tonic::async_trait]
impl Agent for Service {
    type ExecSyncStream = Streamed<ExecSyncEvent>;
    type ExecStream = Streamed<SessionEvent>;
    type AttachStream = Streamed<SessionEvent>;
    type EventsStream = Streamed<Event>;

    async fn configure_sandbox(
        &self,
        request: Request<ConfigureSandboxRequest>,
    ) -> Reply<ConfigureSandboxResponse> {
        let request = request.into_inner();
        self.sandbox.configure(request, &self.containers).await?;
        Ok(Response::new(ConfigureSandboxResponse {}))
    }

    /// The clock is the host's.
    async fn set_time(&self, _: Request<SetTimeRequest>) -> Reply<SetTimeResponse> {
        Ok(Response::new(SetTimeResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Reply<CreateContainerResponse> {
        if !self.sandbox.is_configured().await {
            return Err(Error::NotConfigured.into());
        }
        let state = self.containers.create(request.into_inner()).await?;
        Ok(Response::new(CreateContainerResponse {
            state: Some(state),
        }))
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Reply<StartContainerResponse> {
        let started_at_unix_nanos = self.containers.start(&request.into_inner().id).await?;
        Ok(Response::new(StartContainerResponse {
            started_at_unix_nanos,
        }))
    }

    async fn signal_container(
        &self,
        request: Request<SignalContainerRequest>,
    ) -> Reply<SignalContainerResponse> {
        let SignalContainerRequest { id, signal, all } = request.into_inner();
        self.containers.signal(&id, signal, all).await?;
        Ok(Response::new(SignalContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Reply<RemoveContainerResponse> {
        let containers = self.containers.clone();
        let id = request.into_inner().id;
        // Runs to its end even when the caller gives up.
        tokio::spawn(async move { containers.remove(&id).await })
            .await
            .map_err(Error::from)
            .and_then(|result| result)?;
        Ok(Response::new(RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        _: Request<ListContainersRequest>,
    ) -> Reply<ListContainersResponse> {
        Ok(Response::new(ListContainersResponse {
            containers: self.containers.list().await,
        }))
    }

    async fn update_container(
        &self,
        request: Request<UpdateContainerRequest>,
    ) -> Reply<UpdateContainerResponse> {
        self.containers.update(request.into_inner()).await?;
        Ok(Response::new(UpdateContainerResponse {}))
    }

    async fn exec_sync(&self, request: Request<ExecSyncRequest>) -> Reply<Self::ExecSyncStream> {
        let output = self.containers.exec_sync(request.into_inner()).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(output).map(Ok))))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Reply<Self::ExecStream> {
        let events = ReceiverStream::new(self.containers.exec(request.into_inner())?);
        let events = events.map(|event| event.map_err(Status::from));
        Ok(Response::new(Box::pin(events)))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Reply<Self::AttachStream> {
        let events = ReceiverStream::new(self.containers.attach(request.into_inner())?);
        let events = events.map(|event| event.map_err(Status::from));
        Ok(Response::new(Box::pin(events)))
    }

    async fn resize(&self, request: Request<ResizeRequest>) -> Reply<ResizeResponse> {
        let ResizeRequest {
            token,
            width,
            height,
        } = request.into_inner();
        let resized = self.containers.inner.sessions.resize(&token, width, height);
        resized.map_err(Error::from)?;
        Ok(Response::new(ResizeResponse {}))
    }

    async fn events(&self, _: Request<EventsRequest>) -> Reply<Self::EventsStream> {
        let events = BroadcastStream::new(self.containers.subscribe()).map(|event| {
            event.map_err(|BroadcastStreamRecvError::Lagged(missed)| {
                Status::data_loss(format!("{missed} events were missed: list the containers"))
            })
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Reply<StatsResponse> {
        let response = stats::collect(&self.containers, &request.into_inner()).await?;
        Ok(Response::new(response))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Reply<ShutdownResponse> {
        self.containers.kill_all().await;
        self.shutdown.send_replace(true);
        Ok(Response::new(ShutdownResponse {}))
    }
}
