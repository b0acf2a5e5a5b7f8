//! What happens to pods and containers, told to whoever subscribes.
//!
//! Each driver tells what its published snapshots differ by. Telling never
//! waits: all subscribers read one ring of [`QUEUE`] events, and one that falls
//! further behind learns that it has missed some, and lists.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::context::now_nanos;
use crate::record::{ContainerPhase, ContainerRecord, PodPhase};
use crate::snapshot::PodSnapshot;

/// What a node's pods tell in some seconds of a busy start; each is a few
/// pointers to what is known anyway.
const QUEUE: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EventKind {
    Created,
    Started,
    Stopped,
    Deleted,
}

#[derive(Clone, Debug)]
pub struct Event {
    /// Of the container, or of the pod sandbox itself.
    pub id: String,
    pub kind: EventKind,
    pub at_nanos: i64,
    /// The pod as it was then.
    pub pod: PodSnapshot,
}

/// Events were overwritten before they were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed(pub u64);

#[derive(Clone)]
pub struct Events {
    sender: broadcast::Sender<Arc<Event>>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            sender: broadcast::channel(QUEUE).0,
        }
    }
}

impl Events {
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        Subscription {
            receiver: self.sender.subscribe(),
        }
    }

    pub(crate) fn tell(&self, changes: Vec<(String, EventKind)>, pod: &PodSnapshot) {
        for (id, kind) in changes {
            let event = Event {
                id,
                kind,
                at_nanos: now_nanos(),
                // Who reads of a pod does not keep its connections.
                pod: PodSnapshot {
                    agent: None,
                    ..pod.clone()
                },
            };
            // Nobody may be listening.
            drop(self.sender.send(Arc::new(event)));
        }
    }
}

pub struct Subscription {
    receiver: broadcast::Receiver<Arc<Event>>,
}

impl Subscription {
    /// The next event; None once no more can come. Safe to drop and call again.
    pub async fn next(&mut self) -> Option<Result<Arc<Event>, Missed>> {
        match self.receiver.recv().await {
            Ok(event) => Some(Ok(event)),
            Err(RecvError::Lagged(missed)) => Some(Err(Missed(missed))),
            Err(RecvError::Closed) => None,
        }
    }
}

/// How far something has come that was told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Created,
    Started,
    Stopped,
}

/// What of a snapshot makes events.
struct Sight<'a> {
    pod: &'a str,
    serves: bool,
    listed: bool,
    gone: bool,
    /// By id: the phase, and whether the process ever ran.
    containers: BTreeMap<&'a str, (ContainerPhase, bool)>,
}

/// What was told of a pod and its containers. Pure.
#[derive(Debug, Default)]
pub(crate) struct Told {
    sandbox: Option<Stage>,
    containers: BTreeMap<String, Stage>,
}

impl Told {
    /// What is to be told of a pod that is now as `snapshot` shows it.
    pub(crate) fn changes(&mut self, snapshot: &PodSnapshot) -> Vec<(String, EventKind)> {
        let pod = &snapshot.pod;
        let serving = matches!(pod.phase, PodPhase::Ready | PodPhase::Stopping);
        let of = |c: &ContainerRecord| (c.phase, c.started_at_nanos != 0);
        self.see(&Sight {
            pod: &pod.id,
            serves: serving && pod.failure.is_none() && !snapshot.gone,
            listed: snapshot.is_listed(),
            gone: snapshot.gone,
            containers: snapshot
                .containers
                .iter()
                .map(|(id, record)| (id.as_str(), of(record)))
                .collect(),
        })
    }

    fn see(&mut self, sight: &Sight<'_>) -> Vec<(String, EventKind)> {
        let mut changes = Vec::new();
        let (pod, sandbox) = (sight.pod, &mut self.sandbox);
        if sight.serves {
            step(&mut changes, pod, sandbox, Stage::Started, true);
        } else if sight.listed && sandbox.is_none() {
            step(&mut changes, pod, sandbox, Stage::Created, false);
        }
        for (&id, &(phase, started)) in &sight.containers {
            let mut stage = self.containers.get(id).copied();
            let Some(reached) = reached(phase, stage) else {
                continue;
            };
            step(&mut changes, id, &mut stage, reached, started);
            self.containers
                .extend(stage.map(|stage| (id.to_owned(), stage)));
        }
        self.containers.retain(|id, stage| {
            let stays = sight.containers.contains_key(id.as_str()) && !sight.gone;
            if !stays {
                let mut stage = Some(*stage);
                step(&mut changes, id, &mut stage, Stage::Stopped, false);
                changes.push((id.clone(), EventKind::Deleted));
            }
            stays
        });
        if !sight.serves && self.sandbox.is_some() {
            step(&mut changes, pod, &mut self.sandbox, Stage::Stopped, false);
        }
        if sight.gone && self.sandbox.take().is_some() {
            changes.push((pod.to_owned(), EventKind::Deleted));
        }
        changes
    }
}

/// None while there is nothing to tell: a create that is under way, or the
/// clearing away of one that failed.
fn reached(phase: ContainerPhase, told: Option<Stage>) -> Option<Stage> {
    match phase {
        ContainerPhase::Creating => None,
        ContainerPhase::Created => Some(Stage::Created),
        ContainerPhase::Running => Some(Stage::Started),
        ContainerPhase::Exited => Some(Stage::Stopped),
        ContainerPhase::Removing => told.map(|_| Stage::Stopped),
    }
}

/// Tells what lies between `told` and `reached`; never goes back.
fn step(
    changes: &mut Vec<(String, EventKind)>,
    id: &str,
    told: &mut Option<Stage>,
    reached: Stage,
    started: bool,
) {
    let mut tell = |kind| changes.push((id.to_owned(), kind));
    let before = *told;
    if before.is_none() {
        tell(EventKind::Created);
    }
    let started = started || reached == Stage::Started;
    if before < Some(Stage::Started) && reached >= Stage::Started && started {
        tell(EventKind::Started);
    }
    if before < Some(Stage::Stopped) && reached == Stage::Stopped {
        tell(EventKind::Stopped);
    }
    *told = before.max(Some(reached));
}

#[cfg(test)]
#[path = "events_tests.rs"]
pub(crate) mod tests;
