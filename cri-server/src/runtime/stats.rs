//! Statistics. A pod whose guest does not answer is listed without figures; it
//! never fails the list.

use k8s_cri::v1;
use podsandbox::PodSnapshot;
use tonic::Status;

use super::Runtime;
use crate::convert::{error, filter, stats};

impl Runtime {
    fn mountpoint(&self) -> String {
        self.pods.scratch_dir().to_string_lossy().into_owned()
    }

    pub(super) async fn stats_of_container(&self, id: &str) -> Result<v1::ContainerStatsResponse, Status> {
        let (pod, record) = self.pods.container(id).map_err(error::pod)?;
        let figures = self.pods.stats(&pod).await.map_err(error::pod)?;
        let of = figures.as_ref().and_then(|f| f.containers.iter().find(|c| c.id == record.id));
        let timestamp = figures.as_ref().map_or_else(podsandbox::now_nanos, |f| f.time_unix_nanos);
        Ok(v1::ContainerStatsResponse {
            stats: Some(stats::container(&record, of, timestamp, &self.mountpoint())),
        })
    }

    pub(super) async fn stats_of_containers(
        &self,
        wanted: Option<v1::ContainerStatsFilter>,
    ) -> v1::ListContainerStatsResponse {
        let wanted = wanted.unwrap_or_default();
        let mountpoint = self.mountpoint();
        let mut list = Vec::new();
        for pod in self.pods.list() {
            let picked: Vec<_> =
                pod.containers.values().filter(|c| filter::container_stats_match(c, &wanted)).collect();
            if picked.is_empty() {
                continue;
            }
            let figures = self.figures(&pod).await;
            let timestamp = figures.as_ref().map_or_else(podsandbox::now_nanos, |f| f.time_unix_nanos);
            list.extend(picked.into_iter().map(|record| {
                let of = figures.as_ref().and_then(|f| f.containers.iter().find(|c| c.id == record.id));
                stats::container(record, of, timestamp, &mountpoint)
            }));
        }
        v1::ListContainerStatsResponse { stats: list }
    }

    pub(super) async fn stats_of_pod(&self, id: &str) -> Result<v1::PodSandboxStatsResponse, Status> {
        let pod = self.pods.pod(id).map_err(error::pod)?;
        let figures = self.pods.stats(&pod).await.map_err(error::pod)?;
        Ok(v1::PodSandboxStatsResponse { stats: Some(stats::pod(&pod, figures.as_ref(), &self.mountpoint())) })
    }

    pub(super) async fn stats_of_pods(
        &self,
        wanted: Option<v1::PodSandboxStatsFilter>,
    ) -> v1::ListPodSandboxStatsResponse {
        let wanted = wanted.unwrap_or_default();
        let mountpoint = self.mountpoint();
        let mut list = Vec::new();
        for pod in self.pods.list() {
            let matches = pod.pod.id.starts_with(&wanted.id)
                && filter::labels_match(&pod.pod.spec.labels, &wanted.label_selector);
            if matches {
                let figures = self.figures(&pod).await;
                list.push(stats::pod(&pod, figures.as_ref(), &mountpoint));
            }
        }
        v1::ListPodSandboxStatsResponse { stats: list }
    }

    async fn figures(&self, pod: &PodSnapshot) -> Option<podsandbox::StatsResponse> {
        match self.pods.stats(pod).await {
            Ok(figures) => figures,
            Err(error) => {
                tracing::warn!(pod = %pod.pod.id, error = %error.sentence(), "no statistics from the guest");
                None
            }
        }
    }
}
