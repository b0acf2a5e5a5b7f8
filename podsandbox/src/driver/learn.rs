//! What a driver learns of its pod's machine and guest.
//!
//! The guest's words change a container's record a few times in its life: who
//! it runs as, its process and its start are written once and then fixed, and
//! so is its end. A guest that tells the same or something else again and again
//! has nothing written.

use super::Driver;
use super::containers::{KILLED, end_is_presumed, finished_now};
use super::watch_vm::{Ended, VmEvent};
use crate::agent::plain;
use crate::context::{now_nanos, told_nanos};
use crate::observer::MachineEnd;
use crate::record::{
    ContainerPhase, ContainerRecord, ExitReason, ExitRecord, PodPhase, ResolvedUser,
};

/// What containerd answers for an exit nobody saw.
const UNKNOWN_CODE: i32 = 255;

/// Takes what is not known yet of `state`. Returns whether there was any.
fn learn(record: &mut ContainerRecord, state: &agent_api::ContainerState, now: i64) -> bool {
    let mut is_new = false;
    // On the host's kernel a container has no process before its start.
    if record.pid == 0 && state.pid != 0 {
        record.pid = state.pid;
        is_new = true;
    }
    if record.user.is_none() {
        record.user = Some(ResolvedUser {
            uid: state.uid,
            gid: state.gid,
            supplemental_groups: state.supplemental_groups.clone(),
        });
        is_new = true;
    }
    let runs = state.phase() == agent_api::container_state::Phase::Running;
    if runs && record.phase == ContainerPhase::Created {
        // Started, but the daemon died before it could write that down.
        record.phase = ContainerPhase::Running;
        is_new = true;
    }
    if state.started_at_unix_nanos != 0 && record.started_at_nanos == 0 {
        let told = state.started_at_unix_nanos;
        record.started_at_nanos = told_nanos(told, record.created_at_nanos, now);
        is_new = true;
    }
    is_new
}

/// Marks a container as ended unless it is over. Returns whether it was not.
pub(super) fn end(record: &mut ContainerRecord, reason: ExitReason, message: &str) -> bool {
    let runs = matches!(
        record.phase,
        ContainerPhase::Created | ContainerPhase::Running
    );
    if runs {
        record.phase = ContainerPhase::Exited;
        record.exit = Some(ExitRecord {
            code: match reason {
                ExitReason::Unknown => UNKNOWN_CODE,
                _ => KILLED,
            },
            finished_at_nanos: finished_now(record),
            reason,
            message: message.to_owned(),
            presumed: false,
        });
    }
    runs
}

/// Whether its end was not learnt yet.
fn awaits_exit(record: &ContainerRecord) -> bool {
    record.exit.is_none() || end_is_presumed(record)
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

    pub(super) async fn learn_listing(&mut self, states: Vec<agent_api::ContainerState>) {
        for state in states {
            self.learn_state(state).await;
        }
    }

    async fn learn_state(&mut self, state: agent_api::ContainerState) {
        let Some(record) = self.containers.get_mut(&state.id) else {
            return;
        };
        let is_new = learn(record, &state, now_nanos());
        match state.exit {
            Some(exit) if awaits_exit(record) => self.learn_exit(&state.id, exit).await,
            _ if is_new => self.save_logged(&state.id).await,
            _ => {}
        }
    }

    pub(super) async fn learn_exit(&mut self, id: &str, exit: agent_api::Exit) {
        let Some(record) = self.containers.get_mut(id) else {
            return;
        };
        if !awaits_exit(record) {
            return;
        }
        let presumed = end_is_presumed(record);
        // What is being removed stays so.
        if !presumed {
            record.phase = ContainerPhase::Exited;
        }
        record.exit = Some(ExitRecord {
            code: exit.code,
            // The guest's clock is the guest's word.
            finished_at_nanos: told_nanos(
                exit.finished_at_unix_nanos,
                record.created_at_nanos.max(record.started_at_nanos),
                now_nanos(),
            ),
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
        // One that has told of its end is about to go by itself.
        if ended.end != MachineEnd::MonitorLost {
            self.await_monitor().await;
        }
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
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            let record = self.containers.get_mut(&id);
            if record.is_some_and(|record| end(record, reason, message)) {
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

#[cfg(test)]
mod tests {
    use agent_api::ContainerState;
    use agent_api::container_state::Phase;

    use super::*;

    #[test]
    fn what_was_learnt_once_is_fixed() {
        let mut record = crate::record::tests::container("c", "p", ContainerPhase::Created);
        record.created_at_nanos = 50;
        let state = |uid, started| ContainerState {
            phase: Phase::Running.into(),
            pid: uid + 1,
            uid,
            started_at_unix_nanos: started,
            ..ContainerState::default()
        };
        assert!(learn(&mut record, &state(7, i64::MAX), 90));
        for other in 0..100 {
            assert!(!learn(
                &mut record,
                &state(other, 60 + i64::from(other)),
                200
            ));
        }
        assert_eq!((record.pid, record.started_at_nanos), (8, 90));
        assert_eq!(record.user.unwrap().uid, 7);
        assert_eq!(record.phase, ContainerPhase::Running);
    }
}
