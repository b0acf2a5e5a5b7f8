//! Statistics. A pod whose guest does not answer is listed with what the node
//! knows of it; it never fails the list.

use cri_api::v1;
use podsandbox::PodSnapshot;
use tonic::Status;

use super::Runtime;
use crate::convert::{error, filter, stats};
use crate::figures;
use crate::overhead::is_shown;

impl Runtime {
    fn mountpoint(&self) -> String {
        self.pods.scratch_dir().to_string_lossy().into_owned()
    }

    pub(super) async fn stats_of_container(
        &self,
        id: &str,
    ) -> Result<v1::ContainerStatsResponse, Status> {
        let (pod, record) = self.pods.container(id).map_err(error::pod)?;
        let figures = figures::of_one(&self.pods, &pod).await;
        let of = figures.containers.get(&record.id);
        let timestamp = podsandbox::now_nanos();
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
        let wants = |pod: &PodSnapshot| {
            pod.containers
                .values()
                .any(|c| filter::container_stats_match(c, &wanted))
        };
        let pods = self.pods.list().into_iter().filter(wants).collect();
        let mut list = Vec::new();
        for (pod, figures) in figures::of(&self.pods, pods).await {
            let picked = pod
                .containers
                .values()
                .filter(|c| filter::container_stats_match(c, &wanted));
            list.extend(picked.map(|record| {
                let of = figures.containers.get(&record.id);
                stats::container(record, of, podsandbox::now_nanos(), &mountpoint)
            }));
        }
        v1::ListContainerStatsResponse { stats: list }
    }

    pub(super) async fn stats_of_pod(
        &self,
        id: &str,
    ) -> Result<v1::PodSandboxStatsResponse, Status> {
        let pod = self.pods.pod(id).map_err(error::pod)?;
        let figures = figures::of_one(&self.pods, &pod).await;
        Ok(v1::PodSandboxStatsResponse {
            stats: Some(stats::pod(&pod, &figures, &self.mountpoint())),
        })
    }

    pub(super) async fn stats_of_pods(
        &self,
        wanted: Option<v1::PodSandboxStatsFilter>,
    ) -> v1::ListPodSandboxStatsResponse {
        let wanted = wanted.unwrap_or_default();
        let mountpoint = self.mountpoint();
        let wants = |pod: &PodSnapshot| {
            is_shown(pod)
                && pod.pod.id.starts_with(&wanted.id)
                && filter::labels_match(&pod.pod.spec.labels, &wanted.label_selector)
        };
        let pods = self.pods.list().into_iter().filter(wants).collect();
        let figures = figures::of(&self.pods, pods).await;
        v1::ListPodSandboxStatsResponse {
            stats: figures
                .iter()
                .map(|(pod, of)| stats::pod(pod, of, &mountpoint))
                .collect(),
        }
    }
}
