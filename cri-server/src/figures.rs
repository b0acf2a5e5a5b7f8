//! What pods use, asked of all of them at once.

use std::time::Duration;

use futures_util::future::join_all;
use podsandbox::{Figures, PodManager, PodSnapshot};

/// The kubelet's eviction loop waits for a list of all.
const GUEST_ANSWERS_WITHIN: Duration = Duration::from_secs(2);

pub async fn of(manager: &PodManager, pods: Vec<PodSnapshot>) -> Vec<(PodSnapshot, Figures)> {
    let asked = pods.into_iter().map(|pod| async {
        let figures = of_one(manager, &pod).await;
        (pod, figures)
    });
    // A guest that hangs delays the list by its own time limit only.
    join_all(asked).await
}

pub async fn of_one(manager: &PodManager, pod: &PodSnapshot) -> Figures {
    manager.figures(pod, GUEST_ANSWERS_WITHIN).await
}
