//! From a reserved name to a pod that serves.
//!
//! Each step is timed. The network and the boot run side by side; whatever
//! fails, [`Driver::undo`] frees everything the pod's id may have left.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use tokio_util::sync::CancellationToken;
use vmm_client::protocol::{Event, VmState};
use vmm_client::{Control, FdRole, IdRange, Machine as MachineKind, SpawnRequest, UmlMode, VmSpec};

use super::{Driver, Machine, watch_vm};
use crate::agent::AgentClient;
use crate::config::{Engine, Runtime, RuntimeConfig};
use crate::context::now_nanos;
use crate::error::Step;
use crate::machine::{Decision, check_kernel};
use crate::observer::{MachineEnd, NotStarted};
use crate::phase::PodEvent;
use crate::record::{PhaseTime, PodKind, PodNetworkRecord};
use crate::{Error, Result, cgroup, network, scratch, sysctls, volumes};

/// The console keeps its newest half of this.
const CONSOLE_LIMIT_BYTES: u64 = 256 * 1024;
/// Lines of the guest's console in an error.
const CONSOLE_TAIL_LINES: usize = 8;
const CONSOLE_TAIL_BYTES: u64 = 4096;
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

/// Files and descriptors that the VMM is handed.
struct Parts {
    netns: netns::Netns,
    /// Its queues.
    tap: Vec<OwnedFd>,
    scratch: fs::File,
    /// Filled in once the VMM runs.
    vmm_pid: OnceLock<u32>,
}

/// A machine whose agent has reported ready.
struct Booted {
    control: Control,
    events: vmm_client::Events,
    agent: AgentClient,
}

impl Driver {
    pub(super) async fn start(&mut self, since: Instant) -> Result<()> {
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
        self.tell_of_failure(&error, stopping.is_cancelled());
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
        Err(if stopped { Error::Stopping } else { error })
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

    async fn start_machine(
        &mut self,
        timeline: &Timeline,
        runtime: &Runtime,
        decision: &Decision,
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
                booted = self.boot(timeline, runtime, decision, &parts) => booted,
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
                netns::redirect(&parts.netns, network::INTERFACE, TAP).await?;
                Ok(netns::read_interface(&parts.netns, network::INTERFACE).await?)
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

    async fn boot(
        &self,
        timeline: &Timeline,
        runtime: &Runtime,
        decision: &Decision,
        parts: &Parts,
    ) -> Result<Booted> {
        let spawned = self.spawn(runtime, decision, parts);
        let (mut process, control, mut events) = timeline.time(Step::Vmm, spawned).await?;
        // Reaps the VMM while this daemon is its parent; its end is learnt
        // from the control socket, which also works after a restart.
        tokio::spawn(async move {
            if let Err(error) = process.wait().await {
                tracing::debug!(%error, "cannot wait for a VMM");
            }
        });
        let limit = runtime.settings.boot_timeout_seconds;
        timeline
            .time(Step::Boot, async {
                let ready = async {
                    loop {
                        let Some(Event::State(status)) = events.next().await? else {
                            return Err(Error::BootEnded {
                                end: MachineEnd::MonitorLost,
                                report: format!("its monitor ended{}", self.console_tail()),
                            });
                        };
                        match status.state {
                            VmState::Booting => {}
                            VmState::Ready => return Ok(()),
                            VmState::Ended { reason, cause } => {
                                return Err(Error::BootEnded {
                                    end: cause.into(),
                                    report: reason,
                                });
                            }
                        }
                    }
                };
                tokio::select! {
                    () = self.stopping.cancelled() => Err(Error::Stopping),
                    reached = tokio::time::timeout(Duration::from_secs(limit), ready) => {
                        reached.unwrap_or_else(|_| {
                            Err(Error::BootTimeout { seconds: limit, console: self.console_tail() })
                        })
                    }
                }
            })
            .await?;
        let agent = self.agent();
        Ok(Booted {
            control,
            events,
            agent,
        })
    }

    async fn spawn(
        &self,
        runtime: &Runtime,
        decision: &Decision,
        parts: &Parts,
    ) -> Result<(vmm_client::VmmProcess, Control, vmm_client::Events)> {
        let open = |what: &'static str, path: &Path| {
            fs::File::open(path)
                .map(OwnedFd::from)
                .map_err(|source| Error::File {
                    what,
                    path: path.to_owned(),
                    source,
                })
        };
        let clone = |what: &'static str, fd: &OwnedFd| {
            fd.try_clone().map_err(|source| Error::File {
                what,
                path: self.paths.dir.clone(),
                source,
            })
        };
        let scratch: OwnedFd = parts
            .scratch
            .try_clone()
            .map_err(|source| Error::File {
                what: "scratch disk",
                path: self.paths.scratch.clone(),
                source,
            })?
            .into();
        let kernel = open("guest kernel", &decision.kernel)?;
        check_kernel(&decision.kernel, decision.machine).map_err(Error::GuestKernel)?;
        let mut fds = vec![
            (FdRole::Kernel, kernel),
            (
                FdRole::Initramfs,
                open("initramfs", &runtime.settings.initramfs)?,
            ),
            (FdRole::Netns, parts.netns.fd()?),
            (
                FdRole::ConsoleLog,
                log_file("console log", &self.paths.console)?.into(),
            ),
            (
                FdRole::ControlListener,
                self.listen(SockType::SeqPacket, &self.paths.control)?,
            ),
            (
                FdRole::VsockListener,
                self.listen(SockType::Stream, &self.paths.vsock)?,
            ),
            (FdRole::Scratch, scratch),
        ];
        for queue in &parts.tap {
            fds.push((FdRole::Tap, clone("tap", queue)?));
        }
        if decision.machine == MachineKind::Kvm {
            let device = Path::new(crate::machine::DEVICE);
            let opened = fs::File::options().read(true).write(true).open(device);
            let kvm = opened.map_err(Error::Kvm)?;
            fds.push((FdRole::Kvm, kvm.into()));
        }
        let spec = VmSpec {
            pod_id: self.record.id.clone(),
            machine: decision.machine,
            vcpus: self.record.vcpus,
            memory_mib: self.record.machine_mib(),
            balloon_mib: self.record.balloon_mib(),
            huge_pages: runtime.settings.huge_pages,
            kernel_args: runtime.settings.kernel_args.clone(),
            mac: Some(boot_mac(&self.record.id)),
            mtu: None,
            image_slots: runtime.settings.disk_slots,
            disk_limit: runtime.settings.disk_limit,
            jail_root: self.paths.jail.clone(),
            shared_dir: self.paths.shared.clone(),
            shared_ids: self.record.spec.user_namespace.map(|ids| IdRange {
                guest: ids.host_id,
                length: ids.length,
            }),
            uid: self.record.uid,
            gid: self.record.uid,
            console_limit_bytes: CONSOLE_LIMIT_BYTES,
            fds: fds.iter().map(|(role, _)| *role).collect(),
        };
        let request = SpawnRequest {
            program: self.context.config.vmm.clone(),
            spec,
            fds: fds.into_iter().map(|(_, fd)| fd).collect(),
            log: log_file("VMM log", &self.paths.vmm_log)?,
            cgroup_procs: match &self.record.cgroup {
                Some(group) => cgroup::make(group, &self.record.id)?,
                None => Vec::new(),
            },
        };
        let process = vmm_client::spawn(request).await?;
        parts.vmm_pid.get_or_init(|| process.pid());
        let control = Control::connect(&self.paths.control).await?;
        let events = Control::connect(&self.paths.control)
            .await?
            .subscribe()
            .await?;
        Ok((process, control, events))
    }

    /// The VMM inherits the listening end, so that a connection made before it
    /// accepts is kept.
    pub(super) fn listen(&self, kind: SockType, path: &Path) -> Result<OwnedFd> {
        let bind = || -> nix::Result<OwnedFd> {
            let listener = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
            bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
            listen(&listener, Backlog::MAXCONN)?;
            Ok(listener)
        };
        bind().map_err(|error| Error::File {
            what: "socket",
            path: path.to_owned(),
            source: error.into(),
        })
    }

    /// The guest's last words, for an error.
    fn console_tail(&self) -> String {
        let Ok(bytes) = read_tail(&self.paths.console) else {
            return String::new();
        };
        let text =
            String::from_utf8_lossy(&bytes).replace(|c: char| c.is_control() && c != '\n', " ");
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let tail = &lines[lines.len().saturating_sub(CONSOLE_TAIL_LINES)..];
        if tail.is_empty() {
            "; its console is empty".to_owned()
        } else {
            format!("; console: {}", tail.join(" | "))
        }
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

/// A file of the pod's that its VMM or supervisor writes to.
pub(super) fn log_file(what: &'static str, path: &Path) -> Result<fs::File> {
    fs::File::options()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| Error::File {
            what,
            path: path.to_owned(),
            source,
        })
}

/// The guest can make the console as long as its limit; an error takes less.
/// A queue for each vCPU; more than the vCPUs are of no use.
fn net_queues(settings: &RuntimeConfig, vcpus: u32) -> NonZeroU32 {
    NonZeroU32::new(vcpus.min(settings.net_queues)).unwrap_or(NonZeroU32::MIN)
}

pub(super) fn read_tail(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    let start = length.saturating_sub(CONSOLE_TAIL_BYTES);
    let mut bytes = vec![0; usize::try_from(length - start).unwrap_or(0)];
    let read = file.read_at(&mut bytes, start)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// How many vCPUs the handler's machine can have.
pub(crate) fn max_vcpus(decision: &Decision) -> u32 {
    match decision.machine {
        MachineKind::Uml(UmlMode::Ptrace) => 1,
        MachineKind::Uml(UmlMode::Seccomp) | MachineKind::Kvm => 32,
    }
}

/// A locally administered address for the time before the network is known;
/// the agent then takes the interface's own.
fn boot_mac(id: &str) -> [u8; 6] {
    let mut mac = [0x02, 0, 0, 0, 0, 0];
    for (index, byte) in mac.iter_mut().enumerate().skip(1) {
        *byte = id
            .get(index * 2..index * 2 + 2)
            .and_then(|hex| u8::from_str_radix(hex, 16).ok())
            .unwrap_or(0);
    }
    mac
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
