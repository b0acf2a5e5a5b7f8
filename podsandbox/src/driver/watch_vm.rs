//! Watching a running pod from outside its driver: the VMM's end, and what the
//! agent reports. Both become [`VmEvent`]s in one bounded queue.

use std::collections::HashMap;
use std::time::Duration;

use agent_api::event::Event as AgentEvent;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use vmm_client::protocol::{Event, VmState};

use super::Driver;
use super::containers::{KILLED, end_is_presumed};
use crate::agent::{AgentClient, plain};
use crate::context::now_nanos;
use crate::observer::MachineEnd;
use crate::record::{ContainerPhase, ExitReason, ExitRecord, PodPhase, ResolvedUser};

/// Events the driver has not taken yet; the watcher waits beyond that.
const EVENT_QUEUE: usize = 64;
/// Between attempts to reach an agent whose event stream broke.
const RETRY: Duration = Duration::from_millis(200);

/// What containerd answers for an exit nobody saw.
const UNKNOWN_CODE: i32 = 255;
/// `NGROUPS_MAX` of Linux.
const MAX_GROUPS: usize = 65_536;

pub(super) enum VmEvent {
    /// The state of all containers: first after each (re)connection.
    Listing(Vec<agent_api::ContainerState>),
    Exit {
        container: String,
        exit: agent_api::Exit,
    },
    /// The machine is gone.
    Ended(Ended),
    WatcherGone,
}

/// How it is gone.
pub(super) struct Ended {
    pub(super) end: MachineEnd,
    pub(super) reason: String,
}

impl Ended {
    pub(super) fn lost(reason: String) -> Self {
        Self {
            end: MachineEnd::MonitorLost,
            reason,
        }
    }
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
            let told = loop {
                tokio::select! {
                    () = stopping.cancelled() => return,
                    event = vm.next() => match event {
                        Ok(Some(Event::State(status))) => {
                            if let VmState::Ended { reason, cause } = status.state {
                                let end = cause.into();
                                break Ended { end, reason };
                            }
                        }
                        Ok(None) => break Ended::lost("its monitor process ended".to_owned()),
                        Err(error) => {
                            let reason = format!("its monitor process is out of reach: {error}");
                            break Ended::lost(reason);
                        }
                    }
                }
            };
            ended.cancel();
            // The driver that does not listen any more has ended.
            drop(sender.send(VmEvent::Ended(told)).await);
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
    while let Some(event) = stream
        .message()
        .await
        .map_err(|status| crate::agent::refused("Events", &status))?
    {
        if let Some(AgentEvent::Exit(exit)) = event.event {
            let event = VmEvent::Exit {
                container: event.container_id,
                exit,
            };
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
            VmEvent::Listing(states) => self.learn_listing(states).await,
            VmEvent::Exit { container, exit } => self.learn_exit(&container, exit).await,
            VmEvent::Ended(ended) => self.lose_machine(ended).await,
            VmEvent::WatcherGone => {
                let ended = Ended::lost("its watcher ended".to_owned());
                self.lose_machine(ended).await;
            }
        }
    }

    /// The guest may name what it likes as often as it likes: each container
    /// of the pod is looked at once.
    pub(super) async fn learn_listing(&mut self, states: Vec<agent_api::ContainerState>) {
        let mut by_id: HashMap<String, agent_api::ContainerState> = states
            .into_iter()
            .map(|state| (state.id.clone(), state))
            .collect();
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            if let Some(state) = by_id.remove(&id) {
                self.learn_state(state).await;
            }
        }
    }

    async fn learn_state(&mut self, state: agent_api::ContainerState) {
        let Some(record) = self.containers.get_mut(&state.id) else {
            return;
        };
        let before = (
            record.pid,
            record.user.clone(),
            record.phase,
            record.started_at_nanos,
        );
        record.pid = state.pid;
        record.user = Some(ResolvedUser {
            uid: state.uid,
            gid: state.gid,
            supplemental_groups: state
                .supplemental_groups
                .iter()
                .copied()
                .take(MAX_GROUPS)
                .collect(),
        });
        let running = state.phase() == agent_api::container_state::Phase::Running;
        if running && record.phase == ContainerPhase::Created {
            // Started, but the daemon died before it could write that down.
            record.phase = ContainerPhase::Running;
        }
        if state.started_at_unix_nanos != 0 && record.started_at_nanos == 0 {
            record.started_at_nanos = state.started_at_unix_nanos;
        }
        let after = (
            record.pid,
            record.user.clone(),
            record.phase,
            record.started_at_nanos,
        );
        match state.exit {
            Some(exit) => self.learn_exit(&state.id, exit).await,
            None if before != after => self.save_logged(&state.id).await,
            None => {}
        }
    }

    pub(super) async fn learn_exit(&mut self, id: &str, exit: agent_api::Exit) {
        let Some(record) = self.containers.get_mut(id) else {
            return;
        };
        let presumed = end_is_presumed(record);
        if record.exit.is_some() && !presumed {
            return;
        }
        // What is being removed stays so.
        if !presumed {
            record.phase = ContainerPhase::Exited;
        }
        record.exit = Some(ExitRecord {
            code: exit.code,
            // The guest's clock is the guest's word.
            finished_at_nanos: exit
                .finished_at_unix_nanos
                .clamp(record.created_at_nanos, now_nanos()),
            reason: ExitReason::of(exit.code, exit.oom_killed, &exit.start_error),
            message: plain(&exit.start_error),
            presumed: false,
        });
        self.save_logged(id).await;
        // The next container needs the slot.
        if !presumed {
            self.begin_freeing(id);
        }
    }

    /// The machine ended though nobody stopped the pod: the pod is not ready,
    /// its containers are over, and the kubelet will make a new one.
    async fn lose_machine(&mut self, ended: Ended) {
        self.context.observer.machine_ended(ended.end);
        let reason = plain(&ended.reason);
        tracing::warn!(pod = %self.record.id, %reason, "pod lost its machine");
        self.machine = None;
        self.record.failure = Some(self.ended(&reason));
        self.end_orphans().await;
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
        let code = if reason == ExitReason::Unknown {
            UNKNOWN_CODE
        } else {
            KILLED
        };
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            let Some(record) = self.containers.get_mut(&id) else {
                continue;
            };
            if matches!(
                record.phase,
                ContainerPhase::Created | ContainerPhase::Running
            ) {
                record.phase = ContainerPhase::Exited;
                record.exit = Some(ExitRecord {
                    code,
                    finished_at_nanos: now_nanos(),
                    reason,
                    message: message.to_owned(),
                    presumed: false,
                });
                self.save_logged(&id).await;
            }
        }
    }

    /// For changes nobody waits for: the snapshot is true even when the disk
    /// refuses; after a restart the agent tells again.
    pub(super) async fn save_logged(&self, id: &str) {
        if let Err(error) = self.save_container(id).await {
            tracing::error!(container = id, error = %error.sentence(), "cannot record the container's state");
            self.publish();
        }
    }
}
