//! ListPodSandboxMetrics and its stream: of the pods whose guests answer.

use cri_api::v1;

use super::Runtime;
use crate::convert::metrics;

impl Runtime {
    pub(super) async fn metrics_of_pods(&self) -> Vec<v1::PodSandboxMetrics> {
        let pods = self.pods.list();
        let ready = pods.into_iter().filter(|pod| pod.is_ready()).collect();
        let now = podsandbox::now_nanos();
        let figures = self.figures_of(ready).await;
        figures
            .iter()
            .filter_map(|(pod, figures)| Some(metrics::pod(pod, figures.as_ref()?, now)))
            .collect()
    }
}
