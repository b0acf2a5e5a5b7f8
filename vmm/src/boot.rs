//! From exec to a running guest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::signalfd::SignalFd;
use vmm_client::protocol::{LOG_PORT, READY_PORT, Reply};
use vmm_client::{Machine, VmSpec, packet};

use crate::confinement::{Lacking, go_without};
use crate::console::Console;
use crate::core_scheduling;
use crate::devices::Device;
use crate::devices::balloon::Balloon;
use crate::devices::blk::{Blk, Workers};
use crate::devices::fs::Fs;
use crate::devices::net::Net;
use crate::devices::rng::Rng;
use crate::devices::vsock::{HostPorts, Vsock};
use crate::event_loop::{DeviceRef, EventLoop};
use crate::files::{self, FilesSpec};
use crate::filter::{self, Confine, Role, trap};
use crate::handoff::{Answer, Fds, HandoffError};
use crate::jail;
use crate::logs::{LogHandle, LogService};
use crate::machine::{Ending, Started, kvm, uml};
use crate::supervisor::{self, Notice, Notifier, Parts, Supervisor, chain, microseconds};
use crate::transport::mmio::{Line, MmioTransport};
use crate::transport::vhost_user::{Memory, VhostUser};

/// The guest's address. Each pod's VMM has one guest, so all have the same.
const GUEST_CID: u32 = 3;

/// The virtio-fs tag by which the agent mounts the shared directory.
const SHARED_TAG: &str = "shared";

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("{0}")]
    Prepare(&'static str, #[source] io::Error),
    #[error("the file server")]
    FileServer(#[source] io::Error),
    #[error("device {label}")]
    Device {
        label: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(transparent)]
    Jail(#[from] jail::JailError),
    #[error(transparent)]
    Lacking(#[from] Lacking),
    #[error(transparent)]
    Handoff(#[from] HandoffError),
    #[error("machine uml")]
    Uml(#[from] uml::StartError),
    #[error("machine kvm")]
    Kvm(#[from] kvm::StartError),
}

impl BootError {
    /// What the daemon is told.
    fn answer(&self) -> Reply {
        let message = chain(self);
        match self {
            Self::Lacking(_) | Self::Jail(jail::JailError::Lacking(_)) => {
                Reply::Unconfined { message }
            }
            _ => Reply::Error { message },
        }
    }
}

/// Runs the VM that the daemon hands over on standard input, until it ends.
pub fn run(since: Instant) -> Result<(), BootError> {
    crate::close_surplus_descriptors();
    let answer = Answer::from_stdin()?;
    let supervisor = match boot(&answer, since) {
        Ok(supervisor) => supervisor,
        Err(error) => {
            answer.send(&error.answer())?;
            return Err(error);
        }
    };
    // A daemon that died meanwhile finds the machine by its control socket.
    if let Err(error) = answer.send(&Reply::Ok) {
        tracing::warn!(error = chain(&error), "the daemon has gone");
    }
    supervisor
        .run()
        .map_err(|e| BootError::Prepare("supervise the machine", e))
}

fn boot(answer: &Answer, since: Instant) -> Result<Supervisor, BootError> {
    let (spec, mut fds) = answer.receive()?;
    tracing::info!(pod = spec.pod_id, machine = ?spec.machine, "starting");
    let signals =
        supervisor::block_signals().map_err(|e| BootError::Prepare("block signals", e))?;
    // Whatever it starts has the cookie as well.
    if spec.core_scheduling {
        core_scheduling::take_cookie(spec.confinement)?;
    }
    // All before this process loses the right to.
    if let Err(error) = jail::refuse_devices(&std::mem::take(&mut fds.control_groups)) {
        let lacks = format!("devices cannot be refused by the pod's control group ({error})");
        go_without(spec.confinement, lacks)?;
    }
    let (traps, teller) = trap::pipe().map_err(|e| BootError::Prepare("make a pipe", e))?;
    let files = start_file_server(&spec, &teller).map_err(BootError::FileServer)?;
    trap::tell_through(teller).map_err(|e| BootError::Prepare("handle SIGSYS", e))?;
    let user_ns = match spec.machine {
        Machine::Uml(_) => guests_user_ns(&spec)?,
        Machine::Kvm => None,
    };
    jail::enter(&spec, fds.kernel.as_fd(), fds.initramfs.as_fd())?;
    let jailed_us = microseconds(since);
    let parts = Prepared {
        files,
        signals,
        traps,
        confine: filter::of_node(spec.confinement)?,
        since,
        jailed_us,
        user_ns,
    };
    start(spec, fds, parts)
}

/// What was made while this process had the right to.
struct Prepared {
    files: OwnedFd,
    signals: SignalFd,
    traps: trap::Traps,
    confine: Confine,
    since: Instant,
    jailed_us: u64,
    user_ns: Option<OwnedFd>,
}

/// Executes this program again as the pod's file server; the channel to it.
fn start_file_server(spec: &VmSpec, teller: &OwnedFd) -> io::Result<OwnedFd> {
    let (ours, theirs) = files::channel::pair()?;
    Command::new("/proc/self/exe")
        .arg0(files::NAME)
        .args([files::NAME, &spec.pod_id])
        .stdin(theirs)
        .stdout(Stdio::null())
        // The log of the pod's monitor is its own as well.
        .stderr(Stdio::inherit())
        .spawn()?;
    let told = FilesSpec {
        shared_dir: spec.shared_dir.clone(),
        root: spec.jail_root.clone(),
        ids: spec.shared_ids,
        files: files::guest_files(spec.memory_mib),
        uid: spec.uid,
        gid: spec.gid,
        confinement: spec.confinement,
    };
    packet::send(&ours, &told, &[teller.as_fd()])?;
    Ok(ours)
}

/// A node may be set up to have no user namespaces; the jail is none the less
/// one.
fn guests_user_ns(spec: &VmSpec) -> Result<Option<OwnedFd>, Lacking> {
    match jail::user_ns::make(spec.uid, spec.gid) {
        Ok(made) => Ok(Some(made)),
        Err(error) => {
            let lacks = format!("the guest's kernel gets no user namespace of its own ({error})");
            go_without(spec.confinement, lacks)?;
            Ok(None)
        }
    }
}

fn start(spec: VmSpec, mut fds: Fds, prepared: Prepared) -> Result<Supervisor, BootError> {
    let confine = prepared.confine;
    let (notifier, notices) =
        supervisor::notices().map_err(|e| BootError::Prepare("make an eventfd", e))?;
    let wiring = match fds.kvm.take() {
        Some(kvm) => Wiring::Mmio(Box::new(kvm::Builder::new(kvm::Hardware {
            kvm,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            huge_pages: spec.huge_pages,
        })?)),
        None => Wiring::VhostUser {
            memory: Arc::default(),
            sockets: Vec::new(),
        },
    };
    let mut devices = Devices::new(wiring)?;

    let workers = Workers::default();
    let limited = |disk: Blk| disk.with_workers(&workers).with_rate_limit(spec.disk_limit);
    if let Some(file) = fds.scratch.take() {
        let disk = Blk::scratch("scratch", file).map_err(device_error("scratch"))?;
        let disk = limited(disk).map_err(device_error("scratch"))?;
        devices.add(Kind::Disk, "scratch", disk)?;
    }
    let mut disks = Vec::new();
    for slot in 0..spec.image_slots {
        let label = format!("image{slot}");
        let disk = Blk::empty(&label)
            .and_then(limited)
            .map_err(device_error(&label))?;
        disks.push(devices.add(Kind::Disk, &label, disk)?);
    }
    if let Some(mac) = spec.mac {
        let queues = std::mem::take(&mut fds.tap);
        let net = Net::new(queues, mac, spec.mtu).map_err(device_error("net"))?;
        devices.add(Kind::Quick, "net", net)?;
    }
    let logs = LogService::start(move || confine(Role::Logs))
        .map_err(|e| BootError::Prepare("start the log thread", e))?;
    let ports = Box::new(Ports {
        notifier: notifier.clone(),
        logs: logs.clone(),
        ready: None,
    });
    let vsock = Vsock::new(GUEST_CID, fds.vsock, ports).map_err(device_error("vsock"))?;
    devices.add(Kind::Quick, "vsock", vsock)?;
    let rng = Rng::new(Path::new(jail::URANDOM)).map_err(device_error("rng"))?;
    devices.add(Kind::Quick, "rng", rng)?;
    let balloon = Balloon::new(u64::from(spec.balloon_mib) << 20);
    let balloon = balloon.map_err(device_error("balloon"))?;
    let balloon = devices.add(Kind::Quick, "balloon", balloon)?;

    // It has had all the time of the other devices.
    files::started(&prepared.files).map_err(BootError::FileServer)?;
    let shared = Fs::new(prepared.files, SHARED_TAG).map_err(device_error("fs"))?;
    devices.add(Kind::Shared, "fs", shared)?;

    let console = Console::new(fds.console, spec.console_limit_bytes)
        .map_err(|e| BootError::Prepare("open the console log", e))?;
    let guest = Guest {
        kernel: fds.kernel,
        initramfs: fds.initramfs,
        user_ns: prepared.user_ns,
    };
    let wiring = devices.spawn(&notifier, confine)?;
    let started = start_machine(wiring, spec, guest, &notifier, confine)?;
    let parts = Parts {
        since: prepared.since,
        jailed_us: prepared.jailed_us,
        confine,
        traps: prepared.traps,
        control: fds.control,
        console,
        notices,
        notifier,
        logs,
        disks,
        balloon,
    };
    Supervisor::new(prepared.signals, parts, started)
        .map_err(|e| BootError::Prepare("supervise the machine", e))
}

/// The guest's files, and where its kernel's process is to be.
struct Guest {
    kernel: OwnedFd,
    initramfs: OwnedFd,
    user_ns: Option<OwnedFd>,
}

fn start_machine(
    wiring: Wiring,
    spec: VmSpec,
    guest: Guest,
    notifier: &Notifier,
    confine: Confine,
) -> Result<Started, BootError> {
    match (wiring, spec.machine) {
        (Wiring::VhostUser { sockets, .. }, Machine::Uml(mode)) => Ok(uml::start(uml::Config {
            mode,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            kernel: guest.kernel,
            initramfs: guest.initramfs,
            devices: sockets,
            args: spec.kernel_args,
            unsealed: spec.unsealed,
            user_ns: guest.user_ns,
        })?),
        (Wiring::Mmio(builder), Machine::Kvm) => {
            let notifier = notifier.clone();
            let guest = kvm::Guest {
                kernel: guest.kernel,
                initramfs: guest.initramfs,
                args: spec.kernel_args,
            };
            Ok(builder.start(guest, confine, move |end| {
                notifier.send(Notice::Ended(end.into()));
            })?)
        }
        (_, machine) => Err(HandoffError::Kvm { machine }.into()),
    }
}

fn device_error<E>(label: &str) -> impl FnOnce(E) -> BootError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let label = label.to_owned();
    move |source| BootError::Device {
        label,
        source: source.into(),
    }
}

/// Which loop serves a device.
enum Kind {
    /// Never waits.
    Quick,
    /// May wait for the host's disks.
    Disk,
    /// The shared directory: waits for whatever the volumes are on.
    Shared,
}

/// How the machine reaches its devices.
enum Wiring {
    /// A socket each, with the device's id, in the order they are probed.
    VhostUser {
        memory: Arc<Memory>,
        sockets: Vec<(PathBuf, u32)>,
    },
    /// A window in the guest's memory each.
    Mmio(Box<kvm::Builder>),
}

/// The machine's devices in their loops.
struct Devices {
    quick: EventLoop,
    disk: EventLoop,
    shared: EventLoop,
    wiring: Wiring,
}

impl Devices {
    fn new(wiring: Wiring) -> Result<Self, BootError> {
        let make =
            |name| EventLoop::new(name).map_err(|e| BootError::Prepare("make an event loop", e));
        Ok(Self {
            quick: make(Role::Devices.name())?,
            disk: make(Role::Disks.name())?,
            shared: make(Role::SharedDir.name())?,
            wiring,
        })
    }

    fn add<D: Device>(
        &mut self,
        kind: Kind,
        label: &str,
        device: D,
    ) -> Result<DeviceRef<D>, BootError> {
        let event_loop = match kind {
            Kind::Quick => &mut self.quick,
            Kind::Disk => &mut self.disk,
            Kind::Shared => &mut self.shared,
        };
        match &mut self.wiring {
            Wiring::VhostUser { memory, sockets } => {
                let socket = Path::new(jail::RUN_DIR).join(sockets.len().to_string());
                let transport =
                    VhostUser::listen(&socket, memory.clone()).map_err(device_error(label))?;
                sockets.push((socket, device.id()));
                event_loop
                    .add(label, device, Box::new(transport))
                    .map_err(device_error(label))
            }
            Wiring::Mmio(builder) => {
                let line = Arc::new(Line::new().map_err(device_error(label))?);
                let transport = Box::new(MmioTransport::new(line.clone()));
                let device = event_loop
                    .add(label, device, transport)
                    .map_err(device_error(label))?;
                builder
                    .add(device.slot(), line)
                    .map_err(device_error(label))?;
                Ok(device)
            }
        }
    }

    /// Starts the loops.
    fn spawn(self, notifier: &Notifier, confine: Confine) -> Result<Wiring, BootError> {
        let loops = [
            (self.quick, Role::Devices),
            (self.disk, Role::Disks),
            (self.shared, Role::SharedDir),
        ];
        for (event_loop, role) in loops {
            let notifier = notifier.clone();
            let failed = move |reason| notifier.send(Notice::Ended(Ending::fault(reason)));
            event_loop
                .spawn(move || confine(role), failed)
                .map_err(|e| BootError::Prepare("start a thread", e))?;
        }
        Ok(self.wiring)
    }
}

/// What answers on the host's vsock ports.
struct Ports {
    notifier: Notifier,
    logs: LogHandle,
    ready: Option<UnixStream>,
}

impl HostPorts for Ports {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        match port {
            // Whoever comes after the agent has nothing to tell.
            READY_PORT if self.ready.is_some() => Err(io::ErrorKind::ConnectionRefused.into()),
            READY_PORT => {
                // The connection itself is the message. It is kept, unread, so
                // that the agent can say who it is; what it may say beyond
                // the socket's buffer waits in the guest.
                let (guest, host) = UnixStream::pair()?;
                self.ready = Some(host);
                self.notifier.send(Notice::GuestReady);
                Ok(guest)
            }
            LOG_PORT => self.logs.connect().map_err(io::Error::other),
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }
}
