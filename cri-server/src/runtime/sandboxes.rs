//! Pod sandboxes.

use cri_api::v1;
use tonic::Status;

use super::Runtime;
use crate::convert::{error, filter, pod, required};
use crate::json_info as info;

impl Runtime {
    pub(super) async fn run_sandbox(
        &self,
        request: v1::RunPodSandboxRequest,
    ) -> Result<v1::RunPodSandboxResponse, Status> {
        let config = required("config", request.config)?;
        let spec = pod::parse(config, request.runtime_handler)?;
        let pod_sandbox_id = self.pods.run(spec).await.map_err(error::pod)?;
        Ok(v1::RunPodSandboxResponse { pod_sandbox_id })
    }

    pub(super) async fn stop_sandbox(&self, id: &str) -> Result<(), Status> {
        self.pods.stop(id).await.map_err(error::pod)
    }

    pub(super) async fn remove_sandbox(&self, id: &str) -> Result<(), Status> {
        self.pods.remove(id).await.map_err(error::pod)
    }

    pub(super) fn sandbox_status(
        &self,
        request: &v1::PodSandboxStatusRequest,
    ) -> Result<v1::PodSandboxStatusResponse, Status> {
        let snapshot = self.pods.pod(&request.pod_sandbox_id).map_err(error::pod)?;
        let record = &snapshot.pod;
        let details = || {
            info(serde_json::json!({
                "pid": record.vmm_pid,
                "handler": record.handler,
                "kind": record.kind,
                "vcpus": record.vcpus,
                "memoryMiB": record.memory_mib,
                "machineMiB": record.machine_mib(),
                "vmmUid": record.uid,
                "phase": record.phase,
                "failure": record.failure,
                "console": self.pods.console_path(&snapshot),
                "timeline": record.timeline,
                "spec": record.spec,
            }))
        };
        let statuses = snapshot.containers.values();
        Ok(v1::PodSandboxStatusResponse {
            status: Some(pod::status(&snapshot)),
            info: if request.verbose {
                details()
            } else {
                Default::default()
            },
            containers_statuses: statuses
                .map(|c| crate::convert::container::status(c))
                .collect(),
            timestamp: podsandbox::now_nanos(),
        })
    }

    pub(super) fn list_sandboxes(
        &self,
        request: v1::ListPodSandboxRequest,
    ) -> v1::ListPodSandboxResponse {
        let wanted = request.filter.unwrap_or_default();
        let pods = self.pods.list();
        v1::ListPodSandboxResponse {
            items: pods
                .iter()
                .filter(|p| filter::pod_matches(p, &wanted))
                .map(pod::listed)
                .collect(),
        }
    }
}
