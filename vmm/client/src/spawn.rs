//! Starts a pod's VMM.
//!
//! The VMM is PID 1 of a PID namespace of its own, so that whatever ends it
//! ends all it started; it is in a process group of its own and holds nothing
//! whose loss it would notice when the daemon dies.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::packet::AsyncPackets;
use crate::protocol::Reply;
use crate::spec::VmSpec;
use crate::text::plain;

/// From exec to the machine's start takes some 20 ms; a node that is
/// overloaded beyond this cannot run the pod either.
const START_TIMEOUT: Duration = Duration::from_secs(15);

/// What a VMM that could not start needs to log why and exit.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Everything a pod's VMM is given.
#[derive(Debug)]
pub struct SpawnRequest {
    /// The `drupe-vmm` binary.
    pub program: PathBuf,
    pub spec: VmSpec,
    /// One descriptor for each of [`VmSpec::fds`], in order.
    pub fds: Vec<OwnedFd>,
    /// Takes the VMM's own log lines (its standard error).
    pub log: File,
    /// `cgroup.procs` files that take the VMM before it uses any memory.
    pub cgroup_procs: Vec<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("the VM's spec names {roles} descriptors, {fds} were given")]
    FdCount { roles: usize, fds: usize },
    #[error("cannot prepare to start the VMM")]
    Prepare(#[source] io::Error),
    #[error("cannot start {program} in a PID namespace of its own")]
    Exec { program: PathBuf, source: io::Error },
    #[error("cannot put the VMM under the cgroup of {path}")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("cannot hand the VM's spec to the VMM")]
    Handoff(#[source] io::Error),
    #[error("the VMM failed to start: {message}")]
    Failed { message: String },
    /// Asked for by [`Confinement::Required`](crate::Confinement).
    #[error("{message}")]
    Unconfined { message: String },
    #[error("the VMM ended during its start; its log says why")]
    Ended,
    #[error("the VMM did not start in {} s", START_TIMEOUT.as_secs())]
    TimedOut,
}

/// A running VMM. Dropping this leaves it running.
#[derive(Debug)]
pub struct VmmProcess {
    child: Child,
    pid: Pid,
}

impl VmmProcess {
    /// Its PID in this process's namespace.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Ends it and all it started, at once.
    pub fn kill(&mut self) {
        // A child that was waited for has given its PID back.
        if self.child.id().is_some()
            && let Err(error) = kill(self.pid, Signal::SIGKILL)
        {
            tracing::warn!(pid = self.pid(), %error, "cannot kill a VMM");
        }
    }

    /// Waits for its end. Safe to drop and call again.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }
}

/// Ends a VMM whose start was given up, and reaps it.
struct Undo(Option<VmmProcess>);

impl Undo {
    fn keep(mut self) -> Result<VmmProcess, SpawnError> {
        let kept = self.0.take();
        kept.ok_or_else(|| SpawnError::Prepare(io::Error::other("no process")))
    }

    /// Ends it and returns once it is gone; one that failed by itself may
    /// write its last words.
    async fn now(mut self) {
        if let Some(process) = &mut self.0 {
            if timeout(LAST_WORDS, process.wait()).await.is_err() {
                process.kill();
            }
            if let Err(error) = process.wait().await {
                tracing::warn!(pid = process.pid(), %error, "cannot reap a VMM given up");
            }
        }
        self.0 = None;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(mut process) = self.0.take() {
            process.kill();
            // Reaped by the runtime; unreachable without one.
            if let Ok(runtime) = Handle::try_current() {
                runtime.spawn(async move { process.wait().await });
            }
        }
    }
}

/// Starts a VMM and returns once its machine runs the guest's first
/// instruction. A failure, or dropping the future, leaves no process.
pub async fn spawn(request: SpawnRequest) -> Result<VmmProcess, SpawnError> {
    let SpawnRequest {
        program,
        spec,
        fds,
        log,
        cgroup_procs,
    } = request;
    if spec.fds.len() != fds.len() {
        return Err(SpawnError::FdCount {
            roles: spec.fds.len(),
            fds: fds.len(),
        });
    }
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|e| SpawnError::Prepare(e.into()))?;
    let socket = AsyncPackets::new(ours).map_err(SpawnError::Prepare)?;

    let mut command = Command::new(&program);
    command
        .arg(&spec.pod_id)
        .env_clear()
        .envs(std::env::var_os("RUST_LOG").map(|filter| ("RUST_LOG", filter)))
        .current_dir("/")
        .process_group(0)
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(log);
    let child = spawn_in_pid_namespace(command)
        .await
        .map_err(|source| SpawnError::Exec { program, source })?;
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .map(Pid::from_raw)
        .ok_or_else(|| SpawnError::Prepare(io::Error::other("a child without a PID")))?;
    let undo = Undo(Some(VmmProcess { child, pid }));

    for path in cgroup_procs {
        // The VMM waits for its spec: nothing it uses escapes the cgroup.
        OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(pid.to_string().as_bytes()))
            .map_err(|source| SpawnError::Cgroup { path, source })?;
    }

    if let Err(error) = expose_to_oom_killer(&oom_score_file(pid)) {
        tracing::warn!(%pid, %error, "cannot give a VMM back to the OOM killer");
    }

    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let handoff = async {
        socket.send(&spec, &borrowed).await?;
        socket.recv::<Reply>().await
    };
    let error = match timeout(START_TIMEOUT, handoff).await {
        Ok(Ok(Some(Reply::Ok))) => return undo.keep(),
        Ok(Ok(Some(Reply::Error { message }))) => SpawnError::Failed {
            message: plain(&message),
        },
        Ok(Ok(Some(Reply::Unconfined { message }))) => SpawnError::Unconfined {
            message: plain(&message),
        },
        Ok(Ok(Some(Reply::Status(_)))) => SpawnError::Handoff(io::Error::new(
            io::ErrorKind::InvalidData,
            "an answer of another kind",
        )),
        Ok(Ok(None)) => SpawnError::Ended,
        Ok(Err(e)) if is_hangup(&e) => SpawnError::Ended,
        Ok(Err(e)) => SpawnError::Handoff(e),
        Err(_) => SpawnError::TimedOut,
    };
    undo.now().await;
    Err(error)
}

fn oom_score_file(pid: Pid) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/oom_score_adj"))
}

/// A service is often kept from the OOM killer, and what it starts inherits
/// that. A VMM holds its pod's memory: when the node has none left, the killer
/// must be free to take it.
fn expose_to_oom_killer(score: &Path) -> io::Result<()> {
    let inherited = fs::read_to_string(score)?;
    if inherited.trim_start().starts_with('-') {
        // Only lowering it takes a capability.
        fs::write(score, "0")?;
    }
    Ok(())
}

fn is_hangup(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// Spawns on a thread made for it, because `unshare(CLONE_NEWPID)` is for all
/// later children of the calling thread.
async fn spawn_in_pid_namespace(command: Command) -> io::Result<Child> {
    let (done, spawned) = oneshot::channel();
    let runtime = Handle::current();
    thread::Builder::new()
        .name("vmm-spawn".into())
        .spawn(move || {
            let _entered = runtime.enter();
            let result = unshare(CloneFlags::CLONE_NEWPID)
                .map_err(io::Error::from)
                .and_then(|()| tokio::process::Command::from(command).spawn());
            if let Err(Ok(mut orphan)) = done.send(result) {
                // The caller has given up. Nothing was handed over yet, so the
                // VMM would end by itself; this is sooner.
                if let Err(error) = orphan.start_kill() {
                    tracing::warn!(%error, "cannot kill a VMM given up");
                }
            }
        })?;
    spawned
        .await
        .map_err(|_| io::Error::other("the spawning thread panicked"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_is_given_back_to_the_oom_killer_and_no_more() {
        for (inherited, then) in [("-999\n", "0"), ("0\n", "0\n"), ("300\n", "300\n")] {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), inherited).unwrap();
            expose_to_oom_killer(file.path()).unwrap();
            assert_eq!(fs::read_to_string(file.path()).unwrap(), then);
        }
    }
}
