//! Watching a running pod from outside its driver: the VMM's end, and what the
//! agent reports. Both become [`VmEvent`]s in one bounded queue.

use std::time::Duration;

use agent_api::event::Event as AgentEvent;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use vmm_client::protocol::{Event, VmState};

use super::Driver;
use crate::agent::AgentClient;
use crate::context::now_nanos;
use crate::record::{ContainerPhase, ExitReason, ExitRecord, PodPhase, ResolvedUser};

/// Events the driver has not taken yet; the watcher waits beyond that.
const EVENT_QUEUE: usize = 64;
/// Between attempts to reach an agent whose event stream broke.
const RETRY: Duration = Duration::from_millis(200);

pub(super) enum VmEvent {
    /// The state of all containers: first after each (re)connection.
    Listing(Vec<agent_api::ContainerState>),
    Exit { container: String, exit: agent_api::Exit },
    /// The machine is gone, with the reason.
    Ended(String),
    WatcherGone,
}

/// Starts the watchers; they end with the machine or with `stopping`.
pub(super) fn watch(
    mut vm: vmm_client::Events,
    agent: AgentClient,
    stopping: CancellationToken,
) -> mpsc::Receiver<VmEvent> {
    let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
    let ended = CancellationToken::new();
    {
        let (sender, ended, stopping) = (sender.clone(), ended.clone(), stopping.clone());
        tokio::spawn(async move {
            let reason = loop {
                tokio::select! {
                    () = stopping.cancelled() => return,
                    event = vm.next() => match event {
                        Ok(Some(Event::State(status))) => {
                            if let VmState::Ended { reason } = status.state {
                                break reason;
                            }
                        }
                        Ok(None) => break "its monitor process ended".to_owned(),
                        Err(error) => break format!("its monitor process is out of reach: {error}"),
                    }
                }
            };
            ended.cancel();
            // The driver that does not listen any more has ended.
            drop(sender.send(VmEvent::Ended(reason)).await);
        });
    }
    tokio::spawn(async move {
        tokio::select! {
            () = stopping.cancelled() => {}
            () = ended.cancelled() => {}
            () = follow_agent(&agent, &sender) => {}
        }
    });
    receiver
}

/// Subscribes before it lists, so that no exit falls between the two.
async fn follow_agent(agent: &AgentClient, sender: &mpsc::Sender<VmEvent>) {
    loop {
        if let Err(error) = follow_once(agent, sender).await {
            tracing::debug!(error = %error.sentence(), "agent's event stream broke; trying again");
        }
        if sender.is_closed() {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn follow_once(agent: &AgentClient, sender: &mpsc::Sender<VmEvent>) -> crate::Result<()> {
    let mut stream = agent.events().await?;
    let listing = agent.list().await?;
    if sender.send(VmEvent::Listing(listing)).await.is_err() {
        return Ok(());
    }
    while let Some(event) =
        stream.message().await.map_err(|status| crate::agent::refused("Events", &status))?
    {
        if let Some(AgentEvent::Exit(exit)) = event.event {
            let event = VmEvent::Exit { container: event.container_id, exit };
            if sender.send(event).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

impl Driver {
    pub(super) async fn on_vm_event(&mut self, event: VmEvent) {
        match event {
            VmEvent::Listing(states) => {
                for state in states {
                    self.learn_state(state).await;
                }
            }
            VmEvent::Exit { container, exit } => self.learn_exit(&container, exit).await,
            VmEvent::Ended(reason) => self.lose_machine(reason).await,
            VmEvent::WatcherGone => {
                self.lose_machine("its watcher ended".to_owned()).await;
            }
        }
    }

    async fn learn_state(&mut self, state: agent_api::ContainerState) {
        let Some(record) = self.containers.get_mut(&state.id) else { return };
        record.pid = state.pid;
        record.user = Some(ResolvedUser {
            uid: state.uid,
            gid: state.gid,
            supplemental_groups: state.supplemental_groups.clone(),
        });
        let running = state.phase() == agent_api::container_state::Phase::Running;
        if running && record.phase == ContainerPhase::Created {
            // Started, but the daemon died before it could write that down.
            record.phase = ContainerPhase::Running;
            record.started_at_nanos = state.started_at_unix_nanos;
        }
        if state.started_at_unix_nanos != 0 && record.started_at_nanos == 0 {
            record.started_at_nanos = state.started_at_unix_nanos;
        }
        match state.exit {
            Some(exit) => self.learn_exit(&state.id, exit).await,
            None => self.save_logged(&state.id).await,
        }
    }

    async fn learn_exit(&mut self, id: &str, exit: agent_api::Exit) {
        let Some(record) = self.containers.get_mut(id) else { return };
        if record.exit.is_some() || record.phase == ContainerPhase::Removing {
            return;
        }
        record.phase = ContainerPhase::Exited;
        record.exit = Some(ExitRecord {
            code: exit.code,
            finished_at_nanos: exit.finished_at_unix_nanos,
            reason: ExitReason::of(exit.code, exit.oom_killed, &exit.start_error),
            message: exit.start_error,
        });
        self.save_logged(id).await;
    }

    /// The machine ended though nobody stopped the pod: the pod is not ready,
    /// its containers are over, and the kubelet will make a new one.
    async fn lose_machine(&mut self, reason: String) {
        tracing::warn!(pod = %self.record.id, %reason, "pod lost its machine");
        self.machine = None;
        self.record.failure = Some(format!("the virtual machine ended: {reason}"));
        self.end_containers(ExitReason::Error, &reason).await;
        if self.record.phase == PodPhase::Ready
            && let Err(error) = self.context.store.put_pod(&self.record).await
        {
            tracing::error!(pod = %self.record.id, %error, "cannot record the pod's failure");
        }
        self.publish();
    }

    /// Marks what was not over yet as ended with the machine.
    pub(super) async fn end_containers(&mut self, reason: ExitReason, message: &str) {
        /// What a shell reports of a process that SIGKILL ended.
        const KILLED: i32 = 137;
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            let Some(record) = self.containers.get_mut(&id) else { continue };
            if matches!(record.phase, ContainerPhase::Created | ContainerPhase::Running) {
                record.phase = ContainerPhase::Exited;
                record.exit = Some(ExitRecord {
                    code: KILLED,
                    finished_at_nanos: now_nanos(),
                    reason,
                    message: message.to_owned(),
                });
                self.save_logged(&id).await;
            }
        }
    }

    /// For changes nobody waits for: the snapshot is true even when the disk
    /// refuses; after a restart the agent tells again.
    async fn save_logged(&self, id: &str) {
        if let Err(error) = self.save_container(id).await {
            tracing::error!(container = id, error = %error.sentence(), "cannot record the container's state");
            self.publish();
        }
    }
}
