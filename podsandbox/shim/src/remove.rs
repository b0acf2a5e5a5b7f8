//! RemoveContainer: what is left of it killed, the runtime's notes gone. The
//! bundle and the root file system are the daemon's to remove.

use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::timeout;

use crate::container::Phase;
use crate::error::Error;
use crate::pod::{Containers, is_unknown};
use crate::runtime::Deadline;

/// How long a removal waits for the exit of a container that it has killed to
/// be published, which waits for its output to be written.
const EXIT_PUBLISHED: Duration = Duration::from_secs(2);

impl Containers {
    /// One that does not exist is no error.
    pub async fn remove(&self, id: &str) -> Result<(), Error> {
        let container = match self.get(id) {
            Ok(container) => container,
            Err(_) if self.slots().contains_key(id) => {
                return Err(Error::Phase {
                    id: id.to_owned(),
                    phase: "being created",
                    wanted: Phase::Created.name(),
                });
            }
            Err(_) => return Ok(()),
        };
        let deadline = Deadline::of_request();
        let _removing = container.removing.lock().await;
        let _starting = container.starting.lock().await;
        container.cgroup.kill().await?;
        let (phase, pid) = {
            let state = container.state();
            (state.phase, state.pid)
        };
        if phase == Phase::Running {
            let mut published = container.published.subscribe();
            // It waits for the start to be over, which it is.
            drop(_starting);
            let waited = timeout(EXIT_PUBLISHED, published.wait_for(|done| *done)).await;
            if waited.is_err() {
                let supervisor = container.supervisor.lock();
                let supervisor = supervisor.unwrap_or_else(PoisonError::into_inner).take();
                if let Some(task) = supervisor {
                    task.abort();
                }
                // Who waits for its end waits for nothing more.
                container.published.send_replace(true);
            }
        }
        // The runtime has not heard of one that was never started.
        if pid != 0 {
            match self.inner.runtime.delete(id, deadline.end).await {
                Err(error) if is_unknown(&error) => {}
                deleted => deleted?,
            }
        }
        self.slots().remove(id);
        Ok(())
    }
}
