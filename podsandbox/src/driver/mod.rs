//! The task that owns one pod's mutable state.
//!
//! Its phases are those of [`crate::phase`]; a start that fails is undone, and
//! what resists is tried again.
//!
//! Requests reach it as [`Command`]s and wait for the answer; a caller that
//! goes away changes nothing. What it knows it publishes as a
//! [`PodSnapshot`]. Called by [`crate::manager`] only.

mod boot;
mod containers;
mod create;
mod devices;
mod disks;
mod learn;
mod on_host;
mod orphans;
mod resources;
mod start;
mod stop;
mod take_up;
mod watch_vm;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use vmm_client::Control;

use crate::agent::AgentClient;
use crate::agent::budget::Budget;
use crate::context::Context;
use crate::events::Told;
use crate::faults::{self, Scope};
use crate::observer::{StartFailure, TraceParent};
use crate::paths::PodPaths;
use crate::phase::{PodEvent, PodPhase};
use crate::record::{ContainerPhase, ContainerRecord, PodRecord};
use crate::resize::{ContainerChange, PodChange};
use crate::snapshot::PodSnapshot;
use crate::spec::ContainerSpec;
use crate::{Error, Result};
use watch_vm::VmEvent;

pub(crate) use boot::max_vcpus;
pub(crate) use containers::state_error;
pub(crate) use disks::lease_holder;

/// Requests of one pod that may wait for its driver; the kubelet works on a
/// pod with a handful at a time.
const COMMAND_QUEUE: usize = 64;

/// Between attempts to finish what was begun: a plugin or a disk recovers in
/// seconds or needs a person.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

pub(crate) enum Command {
    Create {
        spec: Box<ContainerSpec>,
        reply: Reply<String>,
    },
    Start {
        id: String,
        reply: Reply<()>,
    },
    Signal {
        id: String,
        signal: u32,
        reply: Reply<()>,
    },
    RemoveContainer {
        id: String,
        reply: Reply<()>,
    },
    ReopenLog {
        id: String,
        reply: Reply<()>,
    },
    UpdateContainer {
        id: String,
        change: Box<ContainerChange>,
        reply: Reply<()>,
    },
    UpdatePod {
        change: Box<PodChange>,
        reply: Reply<()>,
    },
    Stop {
        reply: Reply<()>,
    },
    Remove {
        reply: Reply<()>,
    },
}

impl Command {
    /// A caller that has gone does not want the answer.
    fn refuse(self, why: Error) {
        match self {
            Self::Create { reply, .. } => drop(reply.send(Err(why))),
            Self::Start { reply, .. }
            | Self::Signal { reply, .. }
            | Self::RemoveContainer { reply, .. }
            | Self::ReopenLog { reply, .. }
            | Self::UpdateContainer { reply, .. }
            | Self::UpdatePod { reply, .. }
            | Self::Stop { reply }
            | Self::Remove { reply } => drop(reply.send(Err(why))),
        }
    }
}

/// The way to a driver.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) snapshot: watch::Receiver<PodSnapshot>,
    /// None while the pod is being started, or taken up after a restart.
    pub(crate) started: watch::Receiver<Option<std::result::Result<(), Arc<Error>>>>,
    /// Ends calls under way, so that a stop never waits behind them.
    pub(crate) stopping: CancellationToken,
}

impl Handle {
    /// Waits until the pod's start, or its being taken up, is over; None if its
    /// driver ended without a word.
    pub(crate) async fn settled(&mut self) -> Option<std::result::Result<(), Arc<Error>>> {
        let outcome = self.started.wait_for(Option::is_some).await;
        outcome.ok().and_then(|outcome| outcome.clone())
    }

    /// For commands that end the pod: calls under way are cut short first.
    pub(crate) async fn cancel_and_ask<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T> {
        self.stopping.cancel();
        self.ask(command).await
    }

    pub(crate) async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let id = || self.snapshot.borrow().pod.id.clone();
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| Error::PodNotFound(id()))?;
        answer.await.map_err(|_| Error::PodNotFound(id()))?
    }
}

/// What runs while the pod's machine does.
struct Machine {
    control: Control,
    agent: AgentClient,
    events: mpsc::Receiver<VmEvent>,
}

pub(crate) struct Driver {
    context: Arc<Context>,
    record: PodRecord,
    paths: PodPaths,
    containers: BTreeMap<String, ContainerRecord>,
    machine: Option<Machine>,
    /// What a lost pod runs resists being ended.
    has_orphans: bool,
    /// How often the pod has ended the daemon, if that is too often for
    /// anything to be done with it.
    is_left: Option<u32>,
    /// Containers that have ended and are being freed in the guest.
    freeing: JoinSet<containers::Freed>,
    publish: watch::Sender<PodSnapshot>,
    /// What subscribers were told of the snapshots.
    told: Mutex<Told>,
    started: watch::Sender<Option<std::result::Result<(), Arc<Error>>>>,
    stopping: CancellationToken,
    commands: mpsc::Receiver<Command>,
}

impl Driver {
    fn new(
        context: Arc<Context>,
        record: PodRecord,
        containers: BTreeMap<String, ContainerRecord>,
    ) -> (Self, Handle) {
        let first = PodSnapshot {
            pod: Arc::new(record.clone()),
            containers: shown(&containers),
            agent: None,
            gone: false,
        };
        // What a restarted daemon finds is no news.
        let mut told = Told::default();
        told.changes(&first);
        let (publish, snapshot) = watch::channel(first);
        let (started, started_rx) = watch::channel(None);
        let (sender, commands) = mpsc::channel(COMMAND_QUEUE);
        let stopping = CancellationToken::new();
        let paths = PodPaths::new(&context.config, &record.id);
        let handle = Handle {
            commands: sender,
            snapshot,
            started: started_rx,
            stopping: stopping.clone(),
        };
        let driver = Self {
            context,
            record,
            paths,
            containers,
            machine: None,
            has_orphans: false,
            is_left: None,
            freeing: JoinSet::new(),
            publish,
            told: Mutex::new(told),
            started,
            stopping,
            commands,
        };
        (driver, handle)
    }

    /// A new pod; its driver writes the record before it does anything else.
    pub(crate) fn begin(
        context: Arc<Context>,
        record: PodRecord,
        since: Instant,
        parent: Option<TraceParent>,
    ) -> Handle {
        let (mut driver, handle) = Self::new(context, record, BTreeMap::new());
        let scope = driver.scope();
        tokio::spawn(faults::in_scope(scope, async move {
            let outcome = driver.start(since).await;
            let took = since.elapsed();
            match outcome {
                Ok(()) => {
                    driver.started.send_replace(Some(Ok(())));
                    driver.tell_start(parent.as_ref(), since, took, None);
                    driver.run().await;
                }
                Err(failed) => {
                    let error = Arc::new(failed.error);
                    tracing::warn!(pod = %driver.record.id, error = %error.sentence(), "pod did not start");
                    driver.started.send_replace(Some(Err(Arc::clone(&error))));
                    let failure = StartFailure {
                        why: failed.why,
                        step: failed.step,
                        error: &error,
                        undone_from: failed.undone_from,
                    };
                    driver.tell_start(parent.as_ref(), since, took, Some(failure));
                    if !driver.publish.borrow().gone {
                        driver.run().await;
                    }
                }
            }
        }));
        handle
    }

    /// A pod found on disk after the daemon was restarted, which is taken up
    /// when there is a place in `turn`.
    pub(crate) fn resume(
        context: Arc<Context>,
        record: PodRecord,
        containers: BTreeMap<String, ContainerRecord>,
        turn: Arc<Semaphore>,
    ) -> Handle {
        let (mut driver, handle) = Self::new(context, record, containers);
        if !driver.record.phase.is_shown() {
            // What is left to do is no start that could be joined.
            let cut_off = Err(Arc::new(Error::Stopping));
            driver.started.send_replace(Some(cut_off));
        }
        let scope = driver.scope();
        tokio::spawn(faults::in_scope(scope, async move {
            let place = turn.acquire_owned().await;
            driver.take_up().await;
            drop(place);
            if driver.started.borrow().is_none() {
                driver.started.send_replace(Some(Ok(())));
            }
            if !driver.publish.borrow().gone {
                driver.run().await;
            }
        }));
        handle
    }

    /// Whose fault it is when the daemon panics over this pod.
    fn scope(&self) -> Option<Scope> {
        let (id, name) = (&self.record.id, &self.record.spec.name);
        Some(self.context.faults.scope(id, name))
    }

    async fn run(mut self) {
        let mut pause = RETRY_FIRST;
        loop {
            let unfinished = self.is_unfinished();
            tokio::select! {
                () = tokio::time::sleep(pause), if unfinished => {
                    pause = (pause * 2).min(RETRY_LAST);
                    if self.finish().await {
                        return;
                    }
                }
                command = self.commands.recv() => {
                    let Some(command) = command else { return };
                    if self.handle(command).await {
                        return;
                    }
                }
                Some(freed) = self.freeing.join_next() => self.learn_freed(freed).await,
                event = next_event(&mut self.machine, &self.stopping) => self.on_vm_event(event).await,
            }
        }
    }

    /// Returns whether the pod is gone.
    async fn handle(&mut self, command: Command) -> bool {
        if let Some(ends) = self.is_left {
            let refusal = self.context.faults.refusal(&self.record.spec.name, ends);
            command.refuse(refusal);
            return false;
        }
        // A caller that has gone does not want the answer.
        match command {
            Command::Create { spec, reply } => drop(reply.send(self.create_container(*spec).await)),
            Command::Start { id, reply } => drop(reply.send(self.start_container(&id).await)),
            Command::Signal { id, signal, reply } => {
                drop(reply.send(self.signal_container(&id, signal).await));
            }
            Command::RemoveContainer { id, reply } => {
                drop(reply.send(self.remove_container(&id).await));
            }
            Command::ReopenLog { id, reply } => drop(reply.send(self.reopen_log(&id).await)),
            Command::UpdateContainer { id, change, reply } => {
                drop(reply.send(self.update_container(&id, &change).await));
            }
            Command::UpdatePod { change, reply } => {
                drop(reply.send(self.update_pod(*change).await));
            }
            Command::Stop { reply } => drop(reply.send(self.stop().await)),
            Command::Remove { reply } => drop(reply.send(self.remove().await)),
        }
        self.publish.borrow().gone
    }

    fn publish(&self) {
        self.publish.send_replace(PodSnapshot {
            pod: Arc::new(self.record.clone()),
            containers: shown(&self.containers),
            agent: self.machine.as_ref().map(|machine| machine.agent.clone()),
            gone: false,
        });
        self.tell();
    }

    /// Whoever hears of a change finds it published.
    fn tell(&self) {
        let snapshot = self.publish.borrow();
        // One driver tells of its pod, one snapshot after another.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        self.context.events.tell(told.changes(&snapshot), &snapshot);
    }

    /// Whether a stop or removal of the pod or of a container was begun and
    /// something resisted, or the end of a lost pod's containers did.
    fn is_unfinished(&self) -> bool {
        let removing = |c: &ContainerRecord| c.phase == ContainerPhase::Removing;
        let unfinished = self.record.phase.is_unfinished()
            || self.has_orphans
            || self.containers.values().any(removing);
        unfinished && self.is_left.is_none()
    }

    /// Tries again what was begun. Returns whether the pod is gone.
    async fn finish(&mut self) -> bool {
        if self.has_orphans {
            self.end_orphans().await;
        }
        let result = match self.record.phase {
            PodPhase::Stopping => self.stop().await,
            PodPhase::Removing => self.remove().await,
            _ => self.finish_containers().await,
        };
        if let Err(error) = result {
            tracing::warn!(pod = %self.record.id, error = %error.sentence(), "what was begun cannot be finished yet");
        }
        self.publish.borrow().gone
    }

    /// Takes the pod where `event` leads: written down, then shown.
    async fn advance(&mut self, event: PodEvent) -> Result<()> {
        let Some(phase) = self.record.phase.after(event) else {
            return self.forget().await;
        };
        self.record.phase = phase;
        self.context.store.put_pod(&self.record).await?;
        self.publish();
        Ok(())
    }

    /// For events after which something is freed: a record that cannot be
    /// written, for want of space perhaps, must not keep the space from being
    /// freed.
    async fn advance_anyway(&mut self, event: PodEvent) {
        if let Err(error) = self.advance(event).await {
            tracing::error!(pod = %self.record.id, error = %error.sentence(), "cannot record the pod's phase");
            self.publish();
        }
    }

    async fn forget(&self) -> Result<()> {
        self.context.store.delete_pod(&self.record.id).await?;
        self.publish.send_modify(|snapshot| {
            snapshot.gone = true;
            snapshot.agent = None;
        });
        self.tell();
        Ok(())
    }

    /// Writes a container's record down; what is shown is true either way.
    async fn save_container(&self, id: &str) -> Result<()> {
        let saved = match self.containers.get(id) {
            Some(container) => self.context.store.put_container(container).await,
            None => Ok(()),
        };
        self.publish();
        Ok(saved?)
    }

    /// A client of the pod's agent, which is dialled when it is called.
    fn agent(&self) -> AgentClient {
        let budget = Budget::new(self.context.shared.clone());
        for id in self.containers.keys() {
            budget.know(id);
        }
        AgentClient::of_pod(
            self.paths.vsock.clone(),
            self.stopping.clone(),
            Arc::clone(&self.context.observer),
            budget,
            self.scope(),
        )
    }

    fn machine(&self) -> Result<&Machine> {
        self.machine.as_ref().ok_or_else(|| not_ready(&self.record))
    }

    fn machine_mut(&mut self) -> Result<&mut Machine> {
        self.machine.as_mut().ok_or_else(|| not_ready(&self.record))
    }
}

/// Those that are the pod's. A debug shell's is between its operator and the
/// driver: the kubelet ends what it does not know.
fn shown(containers: &BTreeMap<String, ContainerRecord>) -> BTreeMap<String, Arc<ContainerRecord>> {
    let pods = containers.iter().filter(|(_, c)| !c.spec.debug);
    pods.map(|(id, c)| (id.clone(), Arc::new(c.clone())))
        .collect()
}

fn not_ready(record: &PodRecord) -> Error {
    Error::PodNotReady {
        id: record.id.clone(),
        state: record
            .failure
            .clone()
            .unwrap_or_else(|| "it was stopped".to_owned()),
    }
}

async fn next_event(machine: &mut Option<Machine>, stopping: &CancellationToken) -> VmEvent {
    let Some(machine) = machine else {
        return std::future::pending().await;
    };
    match machine.events.recv().await {
        Some(event) => event,
        // The watchers ended because a stop is on its way.
        None if stopping.is_cancelled() => std::future::pending().await,
        None => VmEvent::WatcherGone,
    }
}
