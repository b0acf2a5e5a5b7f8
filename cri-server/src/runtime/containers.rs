//! Containers and what runs in them.

use std::time::Duration;

use cri_api::v1;
use tonic::Status;

use super::Runtime;
use crate::convert::{container, error, filter, invalid, required, security};
use crate::json_info as info;

impl Runtime {
    pub(super) async fn create(
        &self,
        request: v1::CreateContainerRequest,
    ) -> Result<v1::CreateContainerResponse, Status> {
        let config = required("config", request.config)?;
        security::check_privileged(&config, request.sandbox_config.as_ref())?;
        let spec = container::parse(config)?;
        let container_id = self
            .pods
            .create_container(&request.pod_sandbox_id, spec)
            .await
            .map_err(error::pod)?;
        Ok(v1::CreateContainerResponse { container_id })
    }

    pub(super) async fn start(&self, id: &str) -> Result<(), Status> {
        self.pods.start_container(id).await.map_err(error::pod)
    }

    pub(super) async fn stop(&self, request: v1::StopContainerRequest) -> Result<(), Status> {
        let seconds =
            u64::try_from(request.timeout).map_err(|_| invalid("timeout", "is negative"))?;
        let grace = Duration::from_secs(seconds);
        self.pods
            .stop_container(&request.container_id, grace)
            .await
            .map_err(error::pod)
    }

    pub(super) async fn remove(&self, id: &str) -> Result<(), Status> {
        self.pods.remove_container(id).await.map_err(error::pod)
    }

    pub(super) fn list(&self, request: v1::ListContainersRequest) -> v1::ListContainersResponse {
        let wanted = request.filter.unwrap_or_default();
        let mut containers: Vec<v1::Container> = self
            .pods
            .list()
            .iter()
            .flat_map(|pod| pod.containers.values())
            .filter(|c| filter::container_matches(c, &wanted))
            .map(|c| container::listed(c))
            .collect();
        containers.sort_by_key(|c| std::cmp::Reverse(c.created_at));
        v1::ListContainersResponse { containers }
    }

    pub(super) fn show_container(
        &self,
        request: &v1::ContainerStatusRequest,
    ) -> Result<v1::ContainerStatusResponse, Status> {
        let (pod, record) = self
            .pods
            .container(&request.container_id)
            .map_err(error::pod)?;
        let details = || {
            info(serde_json::json!({
                "sandboxID": pod.pod.id,
                "pid": record.pid,
                "diskSlot": record.slot,
                "volumeDiskSlots": record.volume_slots,
                "deviceDiskSlots": record.device_slots,
                "stopSignal": record.stop_signal,
                "spec": record.spec,
            }))
        };
        Ok(v1::ContainerStatusResponse {
            status: Some(container::status(&record)),
            info: if request.verbose {
                details()
            } else {
                Default::default()
            },
        })
    }

    pub(super) async fn reopen_log(&self, id: &str) -> Result<(), Status> {
        self.pods.reopen_log(id).await.map_err(error::pod)
    }

    pub(super) async fn exec(
        &self,
        request: v1::ExecSyncRequest,
    ) -> Result<v1::ExecSyncResponse, Status> {
        if request.cmd.is_empty() {
            return Err(invalid("cmd", "is empty"));
        }
        let seconds =
            u64::try_from(request.timeout).map_err(|_| invalid("timeout", "is negative"))?;
        let limit = (seconds > 0).then(|| Duration::from_secs(seconds));
        let command = request.cmd.join(" ");
        let output = self
            .pods
            .exec_sync(&request.container_id, request.cmd, limit)
            .await
            .map_err(error::pod)?;
        if output.timed_out {
            return Err(Status::deadline_exceeded(format!(
                "command {command:?} in container {} timed out after {seconds} s and was killed",
                request.container_id
            )));
        }
        Ok(v1::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.exit_code,
        })
    }
}
