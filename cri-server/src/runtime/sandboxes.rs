//! Pod sandboxes.

use cri_api::v1;
use podsandbox::{PodSnapshot, TraceParent};
use tonic::Status;

use super::Runtime;
use crate::convert::{error, filter, pod, required};
use crate::figures;
use crate::json_info as info;
use crate::overhead::{TOOL_LABEL, is_shown};

impl Runtime {
    pub(super) async fn run_sandbox(
        &self,
        request: v1::RunPodSandboxRequest,
        parent: Option<TraceParent>,
    ) -> Result<v1::RunPodSandboxResponse, Status> {
        let config = required("config", request.config)?;
        let spec = pod::parse(config, request.runtime_handler)?;
        let pod_sandbox_id = self.pods.run(spec, parent).await.map_err(error::pod)?;
        Ok(v1::RunPodSandboxResponse { pod_sandbox_id })
    }

    pub(super) async fn stop_sandbox(&self, id: &str) -> Result<(), Status> {
        self.pods.stop(id).await.map_err(error::pod)
    }

    pub(super) async fn remove_sandbox(&self, id: &str) -> Result<(), Status> {
        self.pods.remove(id).await.map_err(error::pod)
    }

    pub(super) async fn sandbox_status(
        &self,
        request: &v1::PodSandboxStatusRequest,
    ) -> Result<v1::PodSandboxStatusResponse, Status> {
        let snapshot = self.pods.pod(&request.pod_sandbox_id).map_err(error::pod)?;
        let record = &snapshot.pod;
        let details = |overhead: Option<serde_json::Value>| {
            info(serde_json::json!({
                "pid": record.vmm_pid,
                "handler": record.handler,
                "kind": record.kind,
                "machine": record.machine_name(),
                "vcpus": record.vcpus,
                "memoryMiB": record.memory_mib,
                "machineMiB": record.machine_mib(),
                "vmmUid": record.uid,
                "phase": record.phase,
                "failure": record.failure,
                "console": self.pods.console_path(&snapshot),
                "overhead": overhead,
                "timeline": record.timeline,
                "spec": record.spec,
            }))
        };
        let statuses = snapshot.containers.values();
        Ok(v1::PodSandboxStatusResponse {
            status: Some(pod::status(&snapshot)),
            info: if request.verbose {
                details(self.overhead(&snapshot).await)
            } else {
                Default::default()
            },
            containers_statuses: statuses
                .map(|c| crate::convert::container::status(c))
                .collect(),
            timestamp: podsandbox::now_nanos(),
        })
    }

    /// Measured now, for who looks at one pod; none if it has no machine that
    /// runs, or the node or the guest does not tell.
    async fn overhead(&self, pod: &PodSnapshot) -> Option<serde_json::Value> {
        if !pod.is_ready() {
            return None;
        }
        let figures = figures::of_one(&self.pods, pod).await;
        let overhead = figures.overhead(&pod.pod)?;
        let shared = self.pods.proportional_overhead(pod, &figures).await;
        let mut value = serde_json::to_value(overhead).ok()?;
        match shared {
            Ok(bytes) => value["proportionalBytes"] = serde_json::json!(bytes),
            Err(error) => {
                tracing::warn!(pod = %pod.pod.id, error = %error.sentence(), "cannot tell the pod's share of memory");
            }
        }
        Some(value)
    }

    pub(super) fn list_sandboxes(
        &self,
        request: v1::ListPodSandboxRequest,
    ) -> v1::ListPodSandboxResponse {
        let wanted = request.filter.unwrap_or_default();
        let pods = self.pods.list();
        let with_tools = wanted.label_selector.contains_key(TOOL_LABEL);
        v1::ListPodSandboxResponse {
            items: pods
                .iter()
                .filter(|p| with_tools || is_shown(p))
                .filter(|p| filter::pod_matches(p, &wanted))
                .map(pod::listed)
                .collect(),
        }
    }
}
