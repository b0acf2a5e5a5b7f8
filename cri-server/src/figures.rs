//! What guests say of themselves and their containers.

use std::time::Duration;

use futures_util::future::join_all;
use podsandbox::{PodManager, PodSnapshot, StatsResponse};

/// The kubelet's eviction loop waits for a list of all.
const GUEST_ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// None for a pod whose guest does not answer.
pub async fn of(
    manager: &PodManager,
    pods: Vec<PodSnapshot>,
) -> Vec<(PodSnapshot, Option<StatsResponse>)> {
    let asked = pods.into_iter().map(|pod| async {
        let figures = of_one(manager, &pod).await;
        (pod, figures)
    });
    // All guests are asked at once: one that hangs delays the list by its own
    // time limit only.
    join_all(asked).await
}

pub async fn of_one(manager: &PodManager, pod: &PodSnapshot) -> Option<StatsResponse> {
    let id = &pod.pod.id;
    match tokio::time::timeout(GUEST_ANSWERS_WITHIN, manager.stats(pod)).await {
        Ok(Ok(figures)) => figures,
        Ok(Err(error)) => {
            tracing::warn!(pod = %id, error = %error.sentence(), "no statistics from the guest");
            None
        }
        Err(_) => {
            tracing::warn!(pod = %id, "the guest is too slow to give statistics");
            None
        }
    }
}
