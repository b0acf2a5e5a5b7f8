//! The `uml` machine: User Mode Linux, a Linux kernel as a process of the
//! host. Its devices connect to us by vhost-user (`virtio_uml.device=`).

mod confine;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::personality::{self, Persona};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::fstat;
use nix::sys::wait::WaitStatus;
use nix::unistd::{AccessFlags, Pid, access};
use vmm_client::UmlMode;

use self::confine::{Confined, Confinement};
use super::{Ending, Machine, Started};
use crate::jail::TMP_DIR;

/// The guest's process list and the host's show it by this name.
const NAME: &str = "drupe-guest";

/// What the kernel is always told. `noreboot` and `panic=-1`: the guest ends
/// instead of starting over. A pod has no use for other consoles.
const ARGS: [&str; 8] = [
    "con0=fd:0,fd:1",
    "con=null",
    "noreboot",
    "panic=-1",
    "quiet",
    "rdinit=/init",
    // The driver is there for whoever asks; no pod shall find one unasked.
    "dummy.numdummies=0",
    // Free memory goes back to the host in pieces of 64 KiB. Linux would wait
    // for pieces of 4 MiB, of which a small guest soon has none.
    "page_reporting.page_reporting_order=4",
];

/// The kernel is the handler's, and so are the ways out.
const UNSEALED: &str = "the guest kernel has not given up the system calls of its start, as \
    drupe's own does: build the handler's kernel with uml-4-seal.patch, or run its pods with \
    `uml_unsealed: true`";

#[derive(Debug)]
pub struct Config {
    pub mode: UmlMode,
    pub vcpus: u32,
    pub memory_mib: u32,
    pub kernel: OwnedFd,
    pub initramfs: OwnedFd,
    /// Socket and virtio device id of each device, in order.
    pub devices: Vec<(PathBuf, u32)>,
    /// More words for the kernel.
    pub args: Vec<String>,
    /// Whether a kernel may run that keeps the calls of its own start.
    pub unsealed: bool,
    /// For its process, if the node has one to give.
    pub user_ns: Option<OwnedFd>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the initramfs cannot be read by the pod's uid")]
    Initramfs(#[source] io::Error),
    #[error(
        "the initramfs of {len} bytes does not fit into the guest's memory of {mib} MiB beside its kernel"
    )]
    InitramfsTooLarge { len: u64, mib: u32 },
    #[error("cannot prepare the guest kernel's process")]
    Prepare(#[source] io::Error),
    #[error("the guest kernel cannot be executed by the pod's uid")]
    Exec(#[source] io::Error),
    #[error(
        "the node's kernel lacks seccomp filters (CONFIG_SECCOMP_FILTER), so nothing would keep \
         the guest's kernel from its system calls; `uml_unsealed: true` runs pods of the handler \
         all the same"
    )]
    NoFilters,
}

/// Starts the kernel. The calling thread must be the process's only user of
/// `fork`: descriptors are made inheritable for a moment.
pub fn start(config: Config) -> Result<Started, StartError> {
    let kernel = format!("/proc/self/fd/{}", config.kernel.as_raw_fd());
    let initramfs = format!("/proc/self/fd/{}", config.initramfs.as_raw_fd());
    // UML reads it by this path, as the pod's uid and without capabilities:
    // so does access(2) look at it, by the real uid.
    access(initramfs.as_str(), AccessFlags::R_OK).map_err(|e| StartError::Initramfs(e.into()))?;
    let initramfs_len = fstat(&config.initramfs)
        .map_err(|e| StartError::Initramfs(e.into()))?
        .st_size
        .cast_unsigned();
    if initramfs_len >= u64::from(config.memory_mib) << 20 {
        return Err(StartError::InitramfsTooLarge {
            len: initramfs_len,
            mib: config.memory_mib,
        });
    }

    let (console, output) = io::pipe().map_err(StartError::Prepare)?;
    let errors = output.try_clone().map_err(StartError::Prepare)?;
    let mut command = Command::new(kernel);
    command
        .arg0(NAME)
        .arg(format!("mem={}M", config.memory_mib))
        .arg(format!("initrd={initramfs}"))
        .arg(match config.mode {
            UmlMode::Seccomp => "seccomp=on",
            UmlMode::Ptrace => "seccomp=off",
        })
        .args((config.vcpus > 1).then(|| format!("ncpus={}", config.vcpus)))
        .args(ARGS)
        .args(
            config
                .devices
                .iter()
                .map(|(socket, id)| format!("virtio_uml.device={}:{id}", socket.display())),
        )
        .args(&config.args)
        .env_clear()
        .env("TMPDIR", TMP_DIR)
        .env("HOME", TMP_DIR)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors);

    if let Some(user_ns) = config.user_ns {
        confine::enter(&mut command, user_ns);
    }
    let confinement = Confinement::of(&mut command, config.mode).map_err(StartError::Prepare)?;
    if confinement.is_none() {
        if !config.unsealed {
            return Err(StartError::NoFilters);
        }
        tracing::warn!("the node's kernel lacks seccomp filters: all its calls are open");
    }

    fcntl(config.initramfs.as_fd(), FcntlArg::F_SETFD(FdFlag::empty()))
        .map_err(|e| StartError::Prepare(e.into()))?;
    // Otherwise UML would set it and execute itself again by its path, which
    // the jail does not have.
    let persona = personality::get().map_err(|e| StartError::Prepare(e.into()))?;
    personality::set(persona | Persona::ADDR_NO_RANDOMIZE)
        .map_err(|e| StartError::Prepare(e.into()))?;
    let child = command.spawn().map_err(StartError::Exec)?;
    personality::set(persona).map_err(|e| StartError::Prepare(e.into()))?;

    let pid = i32::try_from(child.id()).map_err(|e| StartError::Prepare(io::Error::other(e)))?;
    let confined = confinement.map(Confinement::complete).transpose();
    let mut confined = confined.map_err(StartError::Prepare)?;
    let refusals = confined.as_mut().and_then(|c| c.refusals.take());
    Ok(Started {
        machine: Box::new(Uml {
            pid: Some(Pid::from_raw(pid)),
            confined,
            unsealed: config.unsealed,
        }),
        console,
        refusals,
    })
}

/// The kernel's first process. It is reaped by whoever reaps for PID 1.
struct Uml {
    pid: Option<Pid>,
    confined: Option<Confined>,
    unsealed: bool,
}

impl Machine for Uml {
    fn kill(&mut self) {
        // Its helpers and the guest's processes end with our PID namespace.
        if let Some(pid) = self.pid
            && let Err(error) = kill(pid, Signal::SIGKILL)
        {
            tracing::warn!(%error, "the guest kernel cannot be killed");
        }
    }

    fn child_ended(&mut self, status: WaitStatus) -> Option<Ending> {
        if status.pid() != self.pid {
            return None;
        }
        let ending = match status {
            WaitStatus::Exited(_, 0) => Ending::powered_off(),
            WaitStatus::Exited(_, code) => {
                Ending::fault(format!("the guest kernel exited with status {code}"))
            }
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => {
                Ending::killed("the guest kernel was killed, perhaps by the host's OOM killer")
            }
            WaitStatus::Signaled(_, signal, _) => {
                Ending::fault(format!("the guest kernel was ended by {signal}"))
            }
            _ => return None,
        };
        self.pid = None;
        Some(ending)
    }

    fn guest_ready(&mut self) -> Option<Ending> {
        match self.confined.as_mut()?.is_sealed() {
            Ok(true) => None,
            Ok(false) if self.unsealed => {
                tracing::warn!("the guest kernel has kept the system calls of its start");
                None
            }
            Ok(false) => Some(Ending::fault(UNSEALED.to_owned())),
            Err(error) => Some(Ending::fault(format!(
                "whether the guest kernel has given up the system calls of its start cannot be \
                 learnt: {error}"
            ))),
        }
    }
}
