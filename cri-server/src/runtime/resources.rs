//! Resources that change while a pod runs.

use cri_api::v1;
use podsandbox::resize::PodChange;
use tonic::Status;

use super::Runtime;
use crate::convert::{error, resources};

impl Runtime {
    pub(super) async fn update_container(
        &self,
        request: v1::UpdateContainerResourcesRequest,
    ) -> Result<(), Status> {
        let linux = request.linux.unwrap_or_default();
        let change = resources::parse_change("linux", &linux)?;
        self.pods
            .update_container(&request.container_id, change)
            .await
            .map_err(error::pod)
    }

    pub(super) async fn update_sandbox(
        &self,
        request: v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<(), Status> {
        let parse = |field: &str, given: Option<v1::LinuxContainerResources>| {
            given
                .map(|given| resources::parse(field, &given))
                .transpose()
        };
        let change = PodChange {
            resources: parse("resources", request.resources)?,
            overhead: parse("overhead", request.overhead)?,
        };
        self.pods
            .update_pod(&request.pod_sandbox_id, change)
            .await
            .map_err(error::pod)
    }
}
