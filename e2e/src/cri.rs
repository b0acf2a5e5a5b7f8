//! A blocking CRI v1 client: what the kubelet speaks, without the kubelet.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use cri_api::v1::image_service_client::ImageServiceClient;
use cri_api::v1::runtime_service_client::RuntimeServiceClient;
use cri_api::v1::*;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use crate::patient;

/// No call of a test may take longer; the kubelet's own limit is 2 minutes.
const CALL_WITHIN: Duration = Duration::from_secs(120);

/// What an exec's output may amount to.
const MAX_ANSWER: usize = 32 * 1024 * 1024;

#[derive(Clone)]
pub struct Cri {
    tokio: Arc<Runtime>,
    runtime: RuntimeServiceClient<Channel>,
    image: ImageServiceClient<Channel>,
}

macro_rules! rpcs {
    ($($service:ident.$method:ident($request:ty) -> $response:ty;)*) => {
        $(pub fn $method(&self, request: $request) -> Result<$response, Status> {
            let mut request = Request::new(request);
            request.set_timeout(patient(CALL_WITHIN));
            let mut client = self.$service.clone();
            let answer = self.tokio.block_on(client.$method(request))?;
            Ok(answer.into_inner())
        })*
    };
}

/// Calls whose answer is a stream that ends: all its messages.
macro_rules! streams {
    ($($service:ident.$method:ident($request:ty) -> $response:ty;)*) => {
        $(pub fn $method(&self, request: $request) -> Result<Vec<$response>, Status> {
            let mut request = Request::new(request);
            request.set_timeout(patient(CALL_WITHIN));
            let mut client = self.$service.clone();
            self.tokio.block_on(async {
                let mut stream = client.$method(request).await?.into_inner();
                let mut messages = Vec::new();
                while let Some(message) = stream.message().await? {
                    messages.push(message);
                }
                Ok(messages)
            })
        })*
    };
}

impl Cri {
    /// Connects to the socket of a CRI server that listens.
    pub fn connect(socket: &Path) -> Result<Self> {
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start tokio")?;
        let endpoint =
            Endpoint::try_from(format!("unix://{}", socket.display())).context("endpoint")?;
        let channel = tokio
            .block_on(endpoint.connect())
            .with_context(|| format!("connect to {}", socket.display()))?;
        Ok(Self {
            tokio: Arc::new(tokio),
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_ANSWER),
            image: ImageServiceClient::new(channel),
        })
    }

    rpcs! {
        runtime.version(VersionRequest) -> VersionResponse;
        runtime.status(StatusRequest) -> StatusResponse;
        runtime.runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
        runtime.update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
        runtime.run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
        runtime.stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
        runtime.remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse;
        runtime.pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
        runtime.list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
        runtime.create_container(CreateContainerRequest) -> CreateContainerResponse;
        runtime.start_container(StartContainerRequest) -> StartContainerResponse;
        runtime.stop_container(StopContainerRequest) -> StopContainerResponse;
        runtime.remove_container(RemoveContainerRequest) -> RemoveContainerResponse;
        runtime.container_status(ContainerStatusRequest) -> ContainerStatusResponse;
        runtime.list_containers(ListContainersRequest) -> ListContainersResponse;
        runtime.exec_sync(ExecSyncRequest) -> ExecSyncResponse;
        runtime.reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
        runtime.container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
        runtime.list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
        runtime.pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
        runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
        runtime.checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
        runtime.exec(ExecRequest) -> ExecResponse;
        runtime.attach(AttachRequest) -> AttachResponse;
        runtime.port_forward(PortForwardRequest) -> PortForwardResponse;
        runtime.update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
        runtime.update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse;
        runtime.list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
        runtime.list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
        image.pull_image(PullImageRequest) -> PullImageResponse;
        image.list_images(ListImagesRequest) -> ListImagesResponse;
        image.image_status(ImageStatusRequest) -> ImageStatusResponse;
        image.remove_image(RemoveImageRequest) -> RemoveImageResponse;
        image.image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse;
    }

    streams! {
        runtime.stream_pod_sandboxes(StreamPodSandboxesRequest) -> StreamPodSandboxesResponse;
        runtime.stream_containers(StreamContainersRequest) -> StreamContainersResponse;
        runtime.stream_container_stats(StreamContainerStatsRequest) -> StreamContainerStatsResponse;
        runtime.stream_pod_sandbox_stats(StreamPodSandboxStatsRequest) -> StreamPodSandboxStatsResponse;
        runtime.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest) -> StreamPodSandboxMetricsResponse;
        image.stream_images(StreamImagesRequest) -> StreamImagesResponse;
    }

    /// RunPodSandbox by a caller that is traced: `traceparent` as W3C Trace
    /// Context writes it.
    pub fn run_pod_sandbox_in_trace(
        &self,
        request: RunPodSandboxRequest,
        traceparent: &str,
    ) -> Result<RunPodSandboxResponse, Status> {
        let mut request = Request::new(request);
        request.set_timeout(patient(CALL_WITHIN));
        let value = traceparent
            .parse()
            .map_err(|_| Status::internal("no metadata"))?;
        request.metadata_mut().insert("traceparent", value);
        let mut client = self.runtime.clone();
        let answer = self.tokio.block_on(client.run_pod_sandbox(request))?;
        Ok(answer.into_inner())
    }

    /// What happens to containers from now on.
    pub fn container_events(&self) -> Result<ContainerEvents, Status> {
        let mut client = self.runtime.clone();
        let answer = client.get_container_events(GetEventsRequest {});
        Ok(ContainerEvents {
            tokio: self.tokio.clone(),
            stream: self.tokio.block_on(answer)?.into_inner(),
        })
    }

    /// Pulls `image` without credentials; returns its reference.
    pub fn pull(&self, image: &str) -> Result<String, Status> {
        self.pull_with(image, None)
    }

    pub fn pull_with(&self, image: &str, auth: Option<AuthConfig>) -> Result<String, Status> {
        let request = PullImageRequest {
            image: Some(image_spec(image)),
            auth,
            sandbox_config: None,
        };
        Ok(self.pull_image(request)?.image_ref)
    }

    pub fn remove(&self, image: &str) -> Result<(), Status> {
        self.remove_image(RemoveImageRequest {
            image: Some(image_spec(image)),
        })
        .map(drop)
    }

    /// What is known of an image; None when it is not here.
    pub fn find_image(&self, image: &str) -> Result<Option<Image>, Status> {
        let request = ImageStatusRequest {
            image: Some(image_spec(image)),
            verbose: false,
        };
        Ok(self.image_status(request)?.image)
    }

    /// Bytes that images take on this node.
    pub fn image_bytes(&self) -> Result<u64, Status> {
        let info = self.image_fs_info(ImageFsInfoRequest {})?;
        let used = info
            .image_filesystems
            .iter()
            .filter_map(|fs| fs.used_bytes.as_ref());
        Ok(used.map(|used| used.value).sum())
    }
}

pub struct ContainerEvents {
    tokio: Arc<Runtime>,
    stream: Streaming<ContainerEventResponse>,
}

impl ContainerEvents {
    /// The next one; DEADLINE_EXCEEDED if none comes for long.
    pub fn await_next(&mut self) -> Result<Option<ContainerEventResponse>, Status> {
        const WITHIN: Duration = Duration::from_secs(30);
        let stream = &mut self.stream;
        let next = async move { tokio::time::timeout(patient(WITHIN), stream.message()).await };
        let outcome = self.tokio.block_on(next);
        outcome.unwrap_or_else(|_| Err(Status::deadline_exceeded("no event")))
    }
}

#[must_use]
pub fn image_spec(image: &str) -> ImageSpec {
    ImageSpec {
        image: image.to_owned(),
        user_specified_image: image.to_owned(),
        ..Default::default()
    }
}
