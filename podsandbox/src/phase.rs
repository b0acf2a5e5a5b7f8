//! The phases of a pod and what moves it from one to the next.
//!
//! ```text
//! Reserved ─▶ Starting ─▶ Ready ─▶ Stopping ─▶ Stopped ─▶ Removing ─▶ gone
//!     └───────────┴─ the start failed, or the daemon ended ──▲
//! ```
//! Pure: [`crate::driver`] acts, and asks here where that leads.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PodPhase {
    /// The name, id and uid are taken; nothing else may exist yet, anything
    /// may from here on.
    Reserved,
    /// CNI ADD is about to run and the VMM to be spawned, side by side.
    Starting,
    /// The pod serves.
    Ready,
    /// StopPodSandbox has begun; what is left is being freed.
    Stopping,
    /// Nothing is held any more but the record and those of its containers.
    Stopped,
    /// RemovePodSandbox has begun, or a start that failed cannot be undone yet.
    Removing,
}

/// What happens to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodEvent {
    /// Its network and its machine are about to be made.
    PartsBegin,
    /// The agent has answered: the pod can be promised.
    Serves,
    /// It cannot be.
    StartFailed,
    /// The daemon that found this record is not the one that wrote it.
    DaemonRestarted,
    StopAsked,
    RemoveAsked,
    /// Everything it held outside of its record is free.
    Freed,
}

impl PodPhase {
    /// The phase after `event`; None once the record may be deleted. What
    /// does not concern a phase leaves it as it is.
    #[must_use]
    pub fn after(self, event: PodEvent) -> Option<Self> {
        use PodEvent as E;
        Some(match (self, event) {
            (Self::Reserved, E::PartsBegin) => Self::Starting,
            (Self::Starting, E::Serves) => Self::Ready,
            // Also a pod whose record of being ready could not be written:
            // nobody was promised any of these.
            (Self::Reserved | Self::Starting | Self::Ready, E::StartFailed)
            | (Self::Reserved | Self::Starting, E::DaemonRestarted) => Self::Removing,
            // A pod is stopped in order before it is removed.
            (Self::Ready, E::StopAsked | E::RemoveAsked) => Self::Stopping,
            (Self::Stopping, E::Freed) => Self::Stopped,
            (Self::Stopped, E::RemoveAsked) => Self::Removing,
            (Self::Removing, E::Freed) => return None,
            (phase, _) => phase,
        })
    }

    /// Whether something was begun that is tried until it succeeds.
    #[must_use]
    pub fn is_unfinished(self) -> bool {
        matches!(self, Self::Stopping | Self::Removing)
    }

    /// Whether the pod shows in lists: it was promised to somebody, or it
    /// cannot be cleared away.
    #[must_use]
    pub fn is_shown(self) -> bool {
        !matches!(self, Self::Reserved | Self::Starting)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PHASES: [PodPhase; 6] = [
        PodPhase::Reserved,
        PodPhase::Starting,
        PodPhase::Ready,
        PodPhase::Stopping,
        PodPhase::Stopped,
        PodPhase::Removing,
    ];

    const EVENTS: [PodEvent; 7] = [
        PodEvent::PartsBegin,
        PodEvent::Serves,
        PodEvent::StartFailed,
        PodEvent::DaemonRestarted,
        PodEvent::StopAsked,
        PodEvent::RemoveAsked,
        PodEvent::Freed,
    ];

    fn rank(phase: Option<PodPhase>) -> usize {
        PHASES
            .iter()
            .position(|p| Some(*p) == phase)
            .unwrap_or(PHASES.len())
    }

    fn history() -> impl Strategy<Value = Vec<PodEvent>> {
        prop::collection::vec(prop::sample::select(&EVENTS[..]), 0..40)
    }

    /// The phases a pod goes through; the last may be None.
    fn live(events: &[PodEvent]) -> Vec<(PodEvent, Option<PodPhase>)> {
        let mut phase = PodPhase::Reserved;
        let mut seen = Vec::new();
        for event in events {
            let next = phase.after(*event);
            seen.push((*event, next));
            match next {
                Some(next) => phase = next,
                None => break,
            }
        }
        seen
    }

    proptest! {
        #[test]
        fn a_pod_never_goes_back(events in history()) {
            let mut before = Some(PodPhase::Reserved);
            for (_, after) in live(&events) {
                prop_assert!(rank(after) >= rank(before));
                before = after;
            }
        }

        #[test]
        fn a_pod_serves_only_once_its_agent_has_answered(events in history()) {
            let mut before = Some(PodPhase::Reserved);
            for (event, after) in live(&events) {
                if after == Some(PodPhase::Ready) && before != after {
                    prop_assert_eq!(event, PodEvent::Serves);
                    prop_assert_eq!(before, Some(PodPhase::Starting));
                }
                before = after;
            }
        }

        #[test]
        fn nothing_is_stopped_or_gone_that_was_not_freed(events in history()) {
            let mut before = Some(PodPhase::Reserved);
            for (event, after) in live(&events) {
                if after != before && matches!(after, None | Some(PodPhase::Stopped)) {
                    prop_assert_eq!(event, PodEvent::Freed);
                }
                before = after;
            }
        }

        #[test]
        fn a_pod_shown_to_be_ready_leaves_only_on_request(events in history()) {
            // What the driver never does: a start cannot fail after it is done.
            let served = live(&events).iter().position(|(_, p)| *p == Some(PodPhase::Ready));
            let Some(served) = served else { return Ok(()) };
            for (event, after) in live(&events).drain(served + 1..) {
                if after != Some(PodPhase::Ready) {
                    prop_assert!(matches!(
                        event,
                        PodEvent::StopAsked | PodEvent::RemoveAsked | PodEvent::StartFailed
                    ));
                    break;
                }
            }
        }

        #[test]
        fn from_anywhere_a_removal_that_is_tried_again_ends(events in history()) {
            let mut phase = live(&events).last().map_or(Some(PodPhase::Reserved), |(_, p)| *p);
            // A half made pod waits for its start to end or the daemon to come back.
            phase = phase.and_then(|p| p.after(PodEvent::DaemonRestarted));
            for _ in 0..2 {
                phase = phase.and_then(|p| p.after(PodEvent::RemoveAsked));
                phase = phase.and_then(|p| p.after(PodEvent::Freed));
            }
            prop_assert_eq!(phase, None);
        }

        #[test]
        fn a_restart_of_the_daemon_changes_no_pod_that_was_promised(events in history()) {
            let last = live(&events).last().map_or(Some(PodPhase::Reserved), |(_, p)| *p);
            let Some(phase) = last else { return Ok(()) };
            let after = phase.after(PodEvent::DaemonRestarted);
            if phase.is_shown() {
                prop_assert_eq!(after, Some(phase));
            } else {
                prop_assert_eq!(after, Some(PodPhase::Removing));
            }
        }
    }

    #[test]
    fn a_request_to_stop_does_not_take_back_a_removal() {
        let removing = PodPhase::Removing;
        assert_eq!(removing.after(PodEvent::StopAsked), Some(removing));
        assert_eq!(removing.after(PodEvent::Freed), None);
    }
}
