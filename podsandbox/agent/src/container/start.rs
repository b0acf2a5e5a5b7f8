//! StartContainer: the waiting process execs.

use std::sync::Arc;

use super::instance::Phase;
use super::launch::LaunchError;
use super::{Container, Containers, Error};
use crate::clock;

/// As runc answers for a container that could not be set up.
const SETUP_FAILED: i32 = 128;

impl Containers {
    /// When it started, in nanoseconds since the epoch. Runs to its end even
    /// when the caller gives up.
    pub async fn start(&self, id: &str) -> Result<i64, Error> {
        let container = self.get(id)?;
        tokio::spawn(start(container)).await?
    }
}

async fn start(container: Arc<Container>) -> Result<i64, Error> {
    let _starting = container.starting.lock().await;
    {
        let mut state = container.state();
        if state.phase != Phase::Created || *container.ended.borrow() {
            let phase = if state.phase == Phase::Created {
                Phase::Exited
            } else {
                state.phase
            };
            let (phase, wanted) = (phase.name(), Phase::Created.name());
            return Err(Error::Phase {
                id: container.id.clone(),
                phase,
                wanted,
            });
        }
        state.phase = Phase::Starting;
    }
    let outcome = match container.process.go() {
        Ok(()) => container.process.executed().await,
        Err(error) => Err(error),
    };
    let mut state = container.state();
    match outcome {
        Ok(()) => {
            state.phase = Phase::Running;
            state.started_at = clock::now_nanos();
            Ok(state.started_at)
        }
        Err(error) => {
            let code = match &error {
                LaunchError::Exec(exec) => exec.code,
                _ => SETUP_FAILED,
            };
            state.start_error = Some((agent_api::brief(error.to_string()), code));
            Err(error.into())
        }
    }
}
