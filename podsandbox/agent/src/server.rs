//! The gRPC service: converts, calls, maps the error.

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
use tonic::{Code, Request, Response, Status};

use crate::cgroup::CgroupError;
use crate::container::session::SessionError;
use crate::container::stdio::StdioError;
use crate::container::{Containers, Error};
use crate::power;
use crate::sandbox::{self, Sandbox, SandboxError};
use crate::stats;
use crate::userns::UserNsError;

type Reply<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub struct Service {
    sandbox: Sandbox,
    containers: Containers,
    /// Turned true when the guest is to end.
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
        self.sandbox
            .configure(request.into_inner(), &self.containers)
            .await
            .map_err(|error| status(sandbox_code(&error), &error))?;
        Ok(Response::new(ConfigureSandboxResponse {}))
    }

    async fn set_time(&self, request: Request<SetTimeRequest>) -> Reply<SetTimeResponse> {
        sandbox::set_time(request.into_inner().time_unix_nanos)
            .map_err(|error| status(sandbox_code(&error), &error))?;
        Ok(Response::new(SetTimeResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Reply<CreateContainerResponse> {
        if !self.sandbox.is_configured().await {
            return Err(container_status(Error::NotConfigured));
        }
        let state = self
            .containers
            .create(request.into_inner())
            .await
            .map_err(container_status)?;
        Ok(Response::new(CreateContainerResponse {
            state: Some(state),
        }))
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Reply<StartContainerResponse> {
        let started_at_unix_nanos = self
            .containers
            .start(&request.into_inner().id)
            .await
            .map_err(container_status)?;
        Ok(Response::new(StartContainerResponse {
            started_at_unix_nanos,
        }))
    }

    async fn signal_container(
        &self,
        request: Request<SignalContainerRequest>,
    ) -> Reply<SignalContainerResponse> {
        let SignalContainerRequest { id, signal, all } = request.into_inner();
        self.containers
            .signal(&id, signal, all)
            .map_err(container_status)?;
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
            .and_then(|result| result)
            .map_err(container_status)?;
        Ok(Response::new(RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        _: Request<ListContainersRequest>,
    ) -> Reply<ListContainersResponse> {
        Ok(Response::new(ListContainersResponse {
            containers: self.containers.list(),
        }))
    }

    async fn update_container(
        &self,
        request: Request<UpdateContainerRequest>,
    ) -> Reply<UpdateContainerResponse> {
        self.containers
            .update(request.into_inner())
            .await
            .map_err(container_status)?;
        Ok(Response::new(UpdateContainerResponse {}))
    }

    async fn exec_sync(&self, request: Request<ExecSyncRequest>) -> Reply<Self::ExecSyncStream> {
        let output = self
            .containers
            .exec_sync(request.into_inner())
            .await
            .map_err(container_status)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(output).map(Ok))))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Reply<Self::ExecStream> {
        let events = self.containers.exec(request.into_inner());
        let events = ReceiverStream::new(events.map_err(container_status)?);
        let events = events.map(|event| event.map_err(container_status));
        Ok(Response::new(Box::pin(events)))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Reply<Self::AttachStream> {
        let events = self.containers.attach(request.into_inner());
        let events = ReceiverStream::new(events.map_err(container_status)?);
        let events = events.map(|event| event.map_err(container_status));
        Ok(Response::new(Box::pin(events)))
    }

    async fn resize(&self, request: Request<ResizeRequest>) -> Reply<ResizeResponse> {
        let ResizeRequest {
            token,
            width,
            height,
        } = request.into_inner();
        self.containers
            .resize(&token, width, height)
            .map_err(container_status)?;
        Ok(Response::new(ResizeResponse {}))
    }

    async fn events(&self, _: Request<EventsRequest>) -> Reply<Self::EventsStream> {
        let mut shutdown = self.shutdown.subscribe();
        let events = BroadcastStream::new(self.containers.subscribe()).map(|event| {
            event.map_err(|BroadcastStreamRecvError::Lagged(missed)| {
                Status::data_loss(format!("{missed} events were missed: list the containers"))
            })
        });
        let over = async move {
            // A sender that has gone ends the guest as well.
            let _ = shutdown.wait_for(|over| *over).await;
        };
        Ok(Response::new(Box::pin(events.take_until(Box::pin(over)))))
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Reply<StatsResponse> {
        let response = stats::collect(&self.containers, &request.into_inner()).await;
        let response = response.map_err(|error| status(Code::Internal, &error))?;
        Ok(Response::new(response))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Reply<ShutdownResponse> {
        self.containers.kill_all().await;
        power::unmount_disks();
        self.shutdown.send_replace(true);
        Ok(Response::new(ShutdownResponse {}))
    }
}

/// An error with its sources, in one sentence.
fn status(code: Code, error: &dyn std::error::Error) -> Status {
    Status::new(code, sentence(error))
}

/// The error and its causes, not too long to be told.
pub fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Transparent variants repeat their source.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    agent_api::brief(text)
}

fn sandbox_code(error: &SandboxError) -> Code {
    use crate::network::NetworkError as N;
    match error {
        SandboxError::Changed => Code::FailedPrecondition,
        SandboxError::Hostname { .. }
        | SandboxError::LineBreak { .. }
        | SandboxError::SysctlName { .. }
        | SandboxError::Sysctl { .. }
        | SandboxError::User(UserNsError::Range { .. })
        | SandboxError::Network(N::Invalid { .. } | N::TooMany { .. }) => Code::InvalidArgument,
        _ => Code::Internal,
    }
}

fn container_status(error: Error) -> Status {
    use crate::container::{
        DevError, DeviceError, LaunchError, MountError, NodeDeviceError, SpecError,
    };
    use crate::disk::DiskError;
    use crate::rootfs::RootfsError;
    let code = match &error {
        Error::Unknown { .. } | Error::Session(SessionError::Unknown) => Code::NotFound,
        Error::Exists { .. } => Code::AlreadyExists,
        Error::Phase { .. }
        | Error::NotConfigured
        | Error::Session(SessionError::NoTerminal)
        | Error::Cgroup(CgroupError::Absent { .. } | CgroupError::InUse { .. })
        | Error::NodeDevices(NodeDeviceError::NotThere { .. })
        | Error::Rootfs(RootfsError::Disk(DiskError::InUse { .. })) => Code::FailedPrecondition,
        Error::TooMany | Error::TooManyExecs | Error::TooManyAttached | Error::TooSlow { .. } => {
            Code::ResourceExhausted
        }
        Error::SetupTimeout | Error::Session(SessionError::ConnectTimeout) => {
            Code::DeadlineExceeded
        }
        Error::Stdio(StdioError::Token { .. }) => Code::InvalidArgument,
        Error::Stdio(_) => Code::Unavailable,
        Error::Launch(LaunchError::Exec(exec)) if exec.code == 127 => Code::NotFound,
        Error::Rootfs(RootfsError::SubPath { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            Code::NotFound
        }
        Error::Launch(LaunchError::Exec(_)) => Code::PermissionDenied,
        Error::Spec(SpecError::Dev(DevError::Place { .. } | DevError::Owner { .. })) => {
            Code::InvalidArgument
        }
        Error::Spec(
            SpecError::Mount(MountError::Bind { .. })
            | SpecError::Dev(_)
            | SpecError::GuestDevices { .. },
        )
        | Error::Devices(DeviceError::Load(_) | DeviceError::Attach(_)) => Code::Internal,
        Error::Id { .. }
        | Error::Signal { .. }
        | Error::Resources(_)
        | Error::Spec(_)
        | Error::User(_)
        | Error::Seccomp(_)
        | Error::Devices(_)
        | Error::NodeDevices(NodeDeviceError::TooMany { .. } | NodeDeviceError::NoSource { .. })
        | Error::Unmapped { .. }
        | Error::Rootfs(
            RootfsError::TooManyLayers { .. }
            | RootfsError::TooManyVolumes { .. }
            | RootfsError::SubPath { .. },
        )
        | Error::Rootfs(RootfsError::Disk(
            DiskError::Range { .. } | DiskError::TooManyLayers { .. },
        )) => Code::InvalidArgument,
        // What the kernel does not take.
        Error::Cgroup(CgroupError::Name { .. }) => Code::InvalidArgument,
        Error::Cgroup(CgroupError::Set { source, .. })
            if matches!(
                source.raw_os_error(),
                Some(libc::EINVAL | libc::ERANGE | libc::EACCES)
            ) =>
        {
            Code::InvalidArgument
        }
        _ => Code::Internal,
    };
    status(code, &error)
}
