//! The boot of a pod's machine: its VMM spawned with all it needs, until the
//! agent in the guest says that it serves.

use std::fs;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use vmm_client::protocol::{Event, VmState};
use vmm_client::{Control, FdRole, IdRange, Machine as MachineKind, SpawnRequest, UmlMode, VmSpec};

use super::Driver;
use super::start::Timeline;
use crate::agent::AgentClient;
use crate::config::{Runtime, RuntimeConfig};
use crate::error::Step;
use crate::machine::{Decision, check_kernel};
use crate::observer::MachineEnd;
use crate::{Error, Result, cgroup};

/// The console keeps its newest half of this.
const CONSOLE_LIMIT_BYTES: u64 = 256 * 1024;
/// Lines of the guest's console in an error.
const CONSOLE_TAIL_LINES: usize = 8;
const CONSOLE_TAIL_BYTES: u64 = 4096;

/// Files and descriptors that the VMM is handed.
pub(super) struct Parts {
    pub(super) netns: netns::Netns,
    /// Its queues.
    pub(super) tap: Vec<OwnedFd>,
    pub(super) scratch: fs::File,
    /// Filled in once the VMM runs.
    pub(super) vmm_pid: OnceLock<u32>,
}

/// A machine whose agent has reported ready.
pub(super) struct Booted {
    pub(super) control: Control,
    pub(super) events: vmm_client::Events,
    pub(super) agent: AgentClient,
}

impl Driver {
    pub(super) async fn boot(
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
        let wanted = self.context.config.confinement;
        let limits = cgroup::Limits::of_machine(decision.machine, self.record.machine_mib());
        let groups = match &self.record.cgroup {
            Some(parent) => cgroup::make_for_machine(parent, &self.record.id, limits, wanted)?,
            None => cgroup::MachineGroups::default(),
        };
        for dir in &groups.without_device_rule {
            fds.push((FdRole::ControlGroup, open("control group", dir)?));
        }
        let spec = VmSpec {
            pod_id: self.record.id.clone(),
            machine: decision.machine,
            vcpus: self.record.vcpus,
            memory_mib: self.record.machine_mib(),
            balloon_mib: self.record.balloon_mib(),
            huge_pages: runtime.settings.huge_pages,
            kernel_args: runtime.settings.kernel_args.clone(),
            unsealed: runtime.settings.uml_unsealed,
            confinement: wanted,
            core_scheduling: runtime.settings.core_scheduling,
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
            cgroup_procs: groups.procs,
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
    pub(super) fn console_tail(&self) -> String {
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

/// A queue for each vCPU; more than the vCPUs are of no use.
pub(super) fn net_queues(settings: &RuntimeConfig, vcpus: u32) -> NonZeroU32 {
    NonZeroU32::new(vcpus.min(settings.net_queues)).unwrap_or(NonZeroU32::MIN)
}

/// The guest can make the console as long as its limit; an error takes less.
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
