//! What a daemon finds of its predecessor's pods: taken up, finished or undone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use netns::cni::Collection;
use tokio::sync::Semaphore;

use super::PodManager;
use crate::driver::Driver;
use crate::record::{ContainerRecord, PodPhase};
use crate::{Result, cgroup};

/// Pods that run are taken up so many at a time: a few calls to each VMM and
/// guest.
const TAKE_UPS_AT_ONCE: usize = 32;
/// What was half done is undone or finished so many pods at a time: each runs
/// CNI plugins.
const UNDOS_AT_ONCE: usize = 16;
/// Requests are served after this even if a pod's VMM hangs; it takes
/// milliseconds.
const TAKE_UP_WAIT: Duration = Duration::from_secs(10);

impl PodManager {
    pub(super) async fn recover(&self, found: crate::store::Found) -> Result<()> {
        let mut of_pod: HashMap<String, BTreeMap<String, ContainerRecord>> = HashMap::new();
        let mut known: BTreeSet<String> = found.unreadable.iter().cloned().collect();
        for container in found.containers {
            known.insert(container.id.clone());
            of_pod
                .entry(container.pod_id.clone())
                .or_default()
                .insert(container.id.clone(), container);
        }
        cgroup::remove_own_parent();
        let readable = found.pods.iter().map(|pod| &pod.id);
        let ids = readable.chain(&found.unreadable).cloned();
        // Before any driver runs: attaching and detaching have to wait for it.
        match self.context.network.begin_gc(ids).await {
            Ok(collection) => drop(tokio::spawn(self.clone().collect(collection))),
            Err(error) => {
                tracing::warn!(error = %error.sentence(), "cannot look for attachments of pods that are gone");
            }
        }
        let (take_ups, undos) = (
            Arc::new(Semaphore::new(TAKE_UPS_AT_ONCE)),
            Arc::new(Semaphore::new(UNDOS_AT_ONCE)),
        );
        let mut running = Vec::new();
        for pod in found.pods {
            let containers = of_pod.remove(&pod.id).unwrap_or_default();
            let runs = matches!(pod.phase, PodPhase::Ready | PodPhase::Stopped);
            let turn = Arc::clone(if runs { &take_ups } else { &undos });
            let handle = Driver::resume(Arc::clone(&self.context), pod.clone(), containers, turn);
            if runs {
                running.push(handle.clone());
            }
            self.pods().insert(pod.id, handle);
        }
        // Nor are the containers of a pod that cannot be read touched.
        of_pod.retain(|pod, _| !known.contains(pod));
        for container in of_pod.into_values().flatten().map(|(_, c)| c) {
            self.context.images.release(&container.id).await?;
            self.context.store.delete_container(&container.id).await?;
            known.remove(&container.id);
        }
        // A lease is taken just before its container's record is written.
        for (owner, _) in self.context.images.leases() {
            if !known.contains(crate::driver::lease_holder(&owner)) {
                self.context.images.release(&owner).await?;
            }
        }
        let taken_up = async {
            for handle in &mut running {
                handle.settled().await;
            }
        };
        if tokio::time::timeout(TAKE_UP_WAIT, taken_up).await.is_err() {
            tracing::warn!(
                "some pods were not taken up within {} s; serving without waiting for them",
                TAKE_UP_WAIT.as_secs()
            );
        }
        Ok(())
    }

    /// A plugin that fails or hangs must not keep pods from being served.
    async fn collect(self, collection: Collection) {
        if let Err(error) = self.context.network.finish_gc(collection).await {
            tracing::warn!(error = %error.sentence(), "cannot collect attachments of pods that are gone");
        }
    }
}
