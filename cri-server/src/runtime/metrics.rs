//! ListPodSandboxMetrics and its stream: of the pods that run.

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
        let known = figures.iter();
        let known = known.map(|(pod, figures)| metrics::pod(pod, figures, now));
        known.collect()
    }
}
