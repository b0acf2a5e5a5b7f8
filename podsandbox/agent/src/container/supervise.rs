//! The task that follows a container's process to its end.

use std::sync::Arc;

use agent_api::{Event, Exit, event};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::Containers;
use super::instance::{Container, Phase};
use crate::clock;
use crate::reaper::ExitCode;

/// What a container's process leaves to be awaited.
pub(super) struct Vigil {
    pub(super) exit: oneshot::Receiver<ExitCode>,
    pub(super) pumps: Vec<JoinHandle<()>>,
}

/// Follows the process of `container` to its end.
pub(super) async fn supervise(containers: Containers, container: Arc<Container>, vigil: Vigil) {
    // The reaper never drops a sender before it has used it.
    let code = vigil.exit.await.unwrap_or(ExitCode::KILLED);
    let finished_at = clock::now_nanos();
    container.ended.send_replace(true);
    drop(container.starting.lock().await);
    // In a PID namespace that is not its own, other processes outlive it.
    if let Err(error) = container.cgroup.kill().await {
        eprintln!("drupe-agent: container {}: {error}", container.id);
    }
    for pump in vigil.pumps {
        if let Err(error) = pump.await {
            eprintln!("drupe-agent: container {}: output: {error}", container.id);
        }
    }
    // A kernel without the memory controller kills nobody.
    let oom_killed = container.cgroup.oom_kills().is_ok_and(|kills| kills > 0);
    let exit = {
        let mut state = container.state();
        let (start_error, code) = match &state.start_error {
            Some((why, code)) => (why.clone(), *code),
            None => (String::new(), code.0),
        };
        let exit = Exit {
            code,
            oom_killed,
            finished_at_unix_nanos: finished_at,
            start_error,
        };
        state.phase = Phase::Exited;
        state.exit = Some(exit.clone());
        exit
    };
    container.published.send_replace(true);
    // Nobody listens: a daemon that comes back lists the containers.
    let _ = containers.inner.events.send(Event {
        container_id: container.id.clone(),
        event: Some(event::Event::Exit(exit)),
    });
}
