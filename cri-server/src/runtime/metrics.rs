//! ListPodSandboxMetrics and its stream: of the pods whose guests answer.

use cri_api::v1;

use super::Runtime;
use crate::convert::metrics;
use crate::figures;
use crate::overhead::is_shown;

impl Runtime {
    pub(super) async fn metrics_of_pods(&self) -> Vec<v1::PodSandboxMetrics> {
        let pods = self.pods.list();
        let ready = pods
            .into_iter()
            .filter(|pod| pod.is_ready() && is_shown(pod))
            .collect();
        let now = podsandbox::now_nanos();
        let figures = figures::of(&self.pods, ready).await;
        let measured = self.pods.overheads(figures).await;
        let known = measured.iter().filter_map(|(pod, figures, overhead)| {
            let figures = figures.as_ref()?;
            Some(metrics::pod(pod, figures, overhead.as_ref(), now))
        });
        known.collect()
    }
}
