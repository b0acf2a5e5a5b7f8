//! From a reserved name to a pod that serves.
//!
//! Each step is timed. The network and the boot run side by side; whatever
//! fails, [`Driver::undo`] frees everything the pod's id may have left.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::boot::{Parts, net_queues};
use super::{Driver, Machine, watch_vm};
use crate::config::{Engine, Runtime};
use crate::context::now_nanos;
use crate::error::Step;
use crate::machine::Decision;
use crate::observer::{MachineEnd, NotStarted, StartFailure, StartOver, TraceParent};
use crate::phase::PodEvent;
use crate::record::{PhaseTime, PodKind, PodNetworkRecord};
use crate::{Error, Result, cgroup, network, scratch, sysctls, volumes};

const TAP: &str = "tap0";

/// Times steps against the moment the request came in.
pub(super) struct Timeline {
    origin: Instant,
    steps: Mutex<Vec<PhaseTime>>,
}

impl Timeline {
    pub(super) async fn time<T>(
        &self,
        phase: Step,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let start = Instant::now();
        let result = work.await;
        let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        let step = PhaseTime {
            phase,
            start_us: micros(start.duration_since(self.origin)),
            duration_us: micros(start.elapsed()),
        };
        if let Ok(mut steps) = self.steps.lock() {
            steps.push(step);
        }
        result.map_err(|error| match error {
            Error::Start { .. } => error,
            source => Error::Start {
                id: String::new(),
                step: phase,
                source: Box::new(source),
                console: String::new(),
            },
        })
    }
}

/// A start that came to nothing and was undone, as far as it could be.
pub(super) struct Failed {
    /// For whoever asked.
    pub(super) error: Error,
    pub(super) why: NotStarted,
    pub(super) step: Option<Step>,
    /// Since the request came in.
    pub(super) undone_from: Duration,
}

impl Driver {
    pub(super) async fn start(&mut self, since: Instant) -> std::result::Result<(), Failed> {
        let timeline = Timeline {
            origin: since,
            steps: Mutex::default(),
        };
        let stopping = self.stopping.clone();
        let outcome = self.try_start(&timeline).await;
        self.record.timeline = timeline.steps.into_inner().unwrap_or_default();
        let outcome = match outcome {
            Ok(()) => self.advance(PodEvent::Serves).await,
            Err(error) => Err(error),
        };
        let Err(error) = outcome else {
            let steps = whole_steps(&self.record.timeline);
            let observer = &self.context.observer;
            observer.pod_started(&self.record.handler, &steps, since.elapsed());
            return Ok(());
        };
        let undone_from = since.elapsed();
        self.tell_of_failure(&error, stopping.is_cancelled());
        let step = match &error {
            Error::Start { step, .. } => Some(*step),
            _ => None,
        };
        let error = match error {
            Error::Start { step, source, .. } => {
                // What was asked of a guest that gave up is told by its console.
                let of_guest = self.record.kind == PodKind::MicroVm;
                let console = if step == Step::Configure && of_guest {
                    self.console_tail()
                } else {
                    String::new()
                };
                Error::Start {
                    id: self.record.id.clone(),
                    step,
                    source,
                    console,
                }
            }
            other => other,
        };
        let stopped = stopping.is_cancelled();
        // The watchers of a machine that is about to be ended.
        stopping.cancel();
        self.machine = None;
        if let Err(left) = self.undo_and_forget().await {
            tracing::error!(pod = %self.record.id, error = %left.sentence(), "cannot undo a failed start yet");
            self.record.failure = Some(error.sentence());
            self.advance_anyway(PodEvent::StartFailed).await;
        }
        let (error, why) = match stopped {
            true => (Error::Stopping, NotStarted::Stopped),
            false => (error, NotStarted::Failed),
        };
        Err(Failed {
            error,
            why,
            step,
            undone_from,
        })
    }

    /// After the answer: a start does not wait for who traces it.
    pub(super) fn tell_start(
        &self,
        parent: Option<&TraceParent>,
        since: Instant,
        took: Duration,
        failure: Option<StartFailure<'_>>,
    ) {
        let runtime = self.context.config.runtime(&self.record.handler);
        let machine = runtime.ok().and_then(|(_, runtime)| match &runtime.engine {
            Engine::Machine(decision) => Some(decision.machine),
            Engine::Oci(_) => None,
        });
        // Lengths are the monotonic clock's; only where they lie is the node's.
        let now = SystemTime::now();
        self.context.observer.start_over(&StartOver {
            record: &self.record,
            machine,
            parent,
            began: now.checked_sub(since.elapsed()).unwrap_or(now),
            took,
            failure,
        });
    }

    fn tell_of_failure(&self, error: &Error, stopped: bool) {
        let (why, undone) = match stopped {
            true => (NotStarted::Stopped, MachineEnd::Stopped),
            false => (NotStarted::Failed, MachineEnd::StartFailed),
        };
        let cause = match error {
            Error::Start { source, .. } => source.as_ref(),
            other => other,
        };
        let end = match cause {
            Error::BootEnded { end, .. } => Some(*end),
            Error::SupervisorEnded(_) => Some(MachineEnd::MonitorLost),
            // It runs, and is about to be undone.
            _ => self.record.vmm_pid.map(|_| undone),
        };
        let observer = &self.context.observer;
        observer.pod_not_started(&self.record.handler, why);
        if let Some(end) = end {
            observer.machine_ended(end);
        }
    }

    async fn try_start(&mut self, timeline: &Timeline) -> Result<()> {
        let (_, runtime) = self.context.config.runtime(&self.record.handler)?;
        let runtime = runtime.clone();
        self.context.store.put_pod(&self.record).await?;
        self.publish();
        match &runtime.engine {
            Engine::Machine(decision) => self.start_machine(timeline, &runtime, decision).await,
            Engine::Oci(program) => self.start_on_host(timeline, program).await,
        }
    }

    /// The machine joins the pod's control group beside everything that comes
    /// after its boot, as the kernel takes its time for that.
    async fn start_machine(
        &mut self,
        timeline: &Timeline,
        runtime: &Runtime,
        decision: &Decision,
    ) -> Result<()> {
        let (booted, told) = oneshot::channel();
        let group = self.record.spec.cgroup_parent.clone();
        let id = self.record.id.clone();
        let join = async {
            let (Some(parent), Ok(())) = (group, told.await) else {
                return Ok(());
            };
            let work = tokio::task::spawn_blocking(move || cgroup::join(&parent, &id));
            let joined = async { work.await.map_err(|_| Error::Stopping)? };
            timeline.time(Step::Cgroup, joined).await
        };
        // Both to their ends: nothing may be moved while it is undone.
        let machine = self.make_machine(timeline, runtime, decision, booted);
        let (made, joined) = tokio::join!(machine, join);
        made.and(joined)
    }

    async fn make_machine(
        &mut self,
        timeline: &Timeline,
        runtime: &Runtime,
        decision: &Decision,
        has_booted: oneshot::Sender<()>,
    ) -> Result<()> {
        let netns = timeline.time(Step::Netns, self.make_netns()).await?;
        let scratch = timeline
            .time(Step::Scratch, self.make_scratch(runtime))
            .await?;
        let tap = timeline
            .time(Step::Netns, async {
                let queues = net_queues(&runtime.settings, self.record.vcpus);
                Ok(netns::create_tap(&netns, TAP, self.record.uid, queues).await?)
            })
            .await?;
        let parts = Parts {
            netns,
            tap,
            scratch,
            vmm_pid: OnceLock::new(),
        };

        self.advance(PodEvent::PartsBegin).await?;
        self.context.network.ready()?;
        let cni_failed = CancellationToken::new();
        let boot = async {
            tokio::select! {
                () = cni_failed.cancelled() => Err(Error::Stopping),
                booted = self.boot(timeline, runtime, decision, &parts) => booted.inspect(|_| {
                    // Whoever waits for it outlives this.
                    let _ = has_booted.send(());
                }),
            }
        };
        let request = network::request(&self.record, &self.paths);
        let cni = timeline.time(Step::Cni, async {
            tokio::select! {
                () = self.stopping.cancelled() => Err(Error::Stopping),
                added = self.context.network.add(&request) => {
                    if added.is_err() {
                        // The boot beside it is in vain.
                        cni_failed.cancel();
                    }
                    added
                }
            }
        });
        let (booted, added) = tokio::join!(boot, cni);
        self.record.vmm_pid = parts.vmm_pid.get().copied();
        // The network's failure is the more useful one: a boot that failed
        // says so by its own phase when the network is fine.
        let added = added?;
        let booted = booted?;
        self.record.network = Some(PodNetworkRecord {
            ips: added.pod_ips().map(|ip| ip.to_string()).collect(),
        });

        let interface = timeline
            .time(Step::Redirect, async {
                let network = &self.context.network;
                network.redirect(&self.record, &parts.netns, TAP).await
            })
            .await?;
        let dns = network::guest_dns(self.record.spec.dns.as_ref(), &added.dns)?;
        let user_namespace = self
            .record
            .spec
            .user_namespace
            .map(|ids| agent_api::UserNamespace {
                host_id: ids.host_id,
                length: ids.length,
            });
        let request = agent_api::ConfigureSandboxRequest {
            time_unix_nanos: now_nanos(),
            hostname: self.record.spec.hostname.clone(),
            dns: Some(dns),
            interface: Some(network::guest_interface(&interface)),
            sysctls: sysctls::of_guest(&self.record.spec.sysctls),
            share_process_namespace: self.record.spec.share_process_namespace,
            shm_bytes: 0,
            user_namespace,
        };
        timeline
            .time(Step::Configure, booted.agent.configure(request))
            .await?;
        let events = watch_vm::watch(booted.events, booted.agent.clone(), self.stopping.clone());
        self.machine = Some(Machine {
            control: booted.control,
            agent: booted.agent,
            events,
        });
        Ok(())
    }

    async fn make_netns(&self) -> Result<netns::Netns> {
        for dir in [
            &self.paths.dir,
            &self.paths.jail,
            &self.paths.shared,
            &self.paths.stage,
        ] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|source| Error::File {
                    what: "pod directory",
                    path: dir.clone(),
                    source,
                })?;
        }
        volumes::prepare(&self.paths.shared, &self.paths.stage)?;
        Ok(netns::Netns::create(&self.context.config.netns_dir, &self.paths.netns_name).await?)
    }

    async fn make_scratch(&self, runtime: &Runtime) -> Result<fs::File> {
        let path = self.paths.scratch.clone();
        let gib = runtime.settings.scratch_gib;
        let work = move || {
            let dir = path.parent().unwrap_or(Path::new("/"));
            scratch::create(&scratch::template(dir, gib)?, &path)
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|_| Error::Stopping)?
    }
}

/// Each step once: one that was taken in two parts has the time of both.
fn whole_steps(timeline: &[PhaseTime]) -> Vec<(Step, Duration)> {
    let mut steps: BTreeMap<Step, u64> = BTreeMap::new();
    for part in timeline {
        let micros = steps.entry(part.phase).or_default();
        *micros = micros.saturating_add(part.duration_us);
    }
    let steps = steps.into_iter();
    steps
        .map(|(step, micros)| (step, Duration::from_micros(micros)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_in_two_parts_is_one_with_the_time_of_both() {
        let part = |phase, start_us, duration_us| PhaseTime {
            phase,
            start_us,
            duration_us,
        };
        let timeline = [
            part(Step::Netns, 0, 300),
            part(Step::Scratch, 300, 50),
            part(Step::Netns, 350, 200),
        ];
        let micros = Duration::from_micros;
        assert_eq!(
            whole_steps(&timeline),
            [(Step::Netns, micros(500)), (Step::Scratch, micros(50))]
        );
    }
}
