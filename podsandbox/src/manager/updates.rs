//! What changes while it runs, and who hears of changes.

use crate::driver::Command;
use crate::events::Subscription;
use crate::resize::{ContainerChange, PodChange};
use crate::{Error, Result};

use super::PodManager;

impl PodManager {
    /// UpdateContainerResources: the limits change at once, or when a container
    /// has ended, on record only. A memory limit beyond what the guest has
    /// makes the guest grow; all of it or nothing.
    pub async fn update_container(&self, id: &str, change: ContainerChange) -> Result<()> {
        let (handle, container) = self.existing(id)?;
        handle
            .ask(|reply| Command::UpdateContainer {
                id: container.id.clone(),
                change: Box::new(change),
                reply,
            })
            .await
    }

    /// UpdatePodSandboxResources: the guest's memory follows the pod's limit,
    /// down as far and as soon as the guest can do without, up at once.
    pub async fn update_pod(&self, id: &str, change: PodChange) -> Result<()> {
        let handle = self
            .find(id)?
            .ok_or_else(|| Error::PodNotFound(id.to_owned()))?;
        let change = Box::new(change);
        handle
            .ask(|reply| Command::UpdatePod { change, reply })
            .await
    }

    /// What happens to pods and containers from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        self.context.events.subscribe()
    }
}
