//! Starts a pod's supervisor in the pod's namespaces.
//!
//! It is handed the listening ends of its sockets, so that whoever knows the
//! pod's id can reach and end it from its first moment on; and it does nothing
//! before it is asked to, by when it is in its control group.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use tokio::process::Child;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::spec::Host;
use crate::spec::HostNamespaces;
use crate::{Error, Result};

/// Next to that of the node's own daemons, which the kubelet gives -999.
const OOM_SCORE: i32 = -998;

/// What a supervisor is given.
pub struct Request {
    /// The `drupe-shim` program.
    pub program: PathBuf,
    pub pod: String,
    pub dir: PathBuf,
    /// Where it makes the files of /etc.
    pub etc: PathBuf,
    pub runtime: PathBuf,
    /// The pod's control group, from its hierarchy's root.
    pub cgroup: PathBuf,
    /// `cgroup.procs` files that take the supervisor.
    pub cgroup_procs: Vec<PathBuf>,
    pub host: HostNamespaces,
    /// None in the host's network.
    pub netns: Option<OwnedFd>,
    pub control: OwnedFd,
    pub streams: OwnedFd,
    pub log: File,
}

/// Starts it. A failure leaves no process.
pub async fn spawn(request: Request) -> Result<Child> {
    let Request {
        program,
        pod,
        dir,
        etc,
        runtime,
        cgroup,
        cgroup_procs,
        host,
        netns,
        control,
        streams,
        log,
    } = request;
    let mut command = Command::new(&program);
    command
        .args(["supervise", &pod, "--dir"])
        .arg(&dir)
        .arg("--etc")
        .arg(&etc)
        .arg("--runtime")
        .arg(&runtime)
        .arg("--cgroup")
        .arg(&cgroup)
        .args(host.network.then_some("--host-network"))
        .env_clear()
        .envs(["RUST_LOG", "PATH"].iter().filter_map(|&name| {
            let value = std::env::var_os(name)?;
            Some((name, value))
        }))
        .current_dir("/")
        .process_group(0)
        .stdin(control)
        .stdout(streams)
        .stderr(log);
    let mut namespaces = CloneFlags::empty();
    if !host.ipc {
        namespaces |= CloneFlags::CLONE_NEWIPC;
    }
    // The host's name belongs to its addresses.
    if !host.network {
        namespaces |= CloneFlags::CLONE_NEWUTS;
    }
    let failed = |source| Error::File {
        what: "supervisor",
        path: program.clone(),
        source,
    };
    let mut child = spawn_in(command, netns, namespaces).await.map_err(failed)?;
    let settled = settle(&child, &cgroup_procs);
    if settled.is_err()
        // Killed and reaped: nothing was asked of it yet.
        && let Err(error) = child.kill().await
    {
        tracing::warn!(%error, "cannot end a supervisor given up");
    }
    settled.map(|()| child)
}

/// What is the process's own on the node, before it does anything.
fn settle(child: &Child, cgroup_procs: &[PathBuf]) -> Result<()> {
    let id = child.id().unwrap_or(0).to_string();
    for path in cgroup_procs {
        write(path, &id).map_err(|source| Error::File {
            what: "control group",
            path: path.clone(),
            source,
        })?;
    }
    // The pod ends with it, so it goes after everything else of the pod. What
    // it starts has a preference of its own.
    let score = Host::read().oom_score(OOM_SCORE);
    let path = PathBuf::from(format!("/proc/{id}/oom_score_adj"));
    if let Err(error) = write(&path, &score.to_string()) {
        tracing::warn!(%error, "cannot keep the OOM killer from a supervisor");
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    file.write_all(text.as_bytes())
}

/// Spawns on a thread made for it, which is in the namespaces that the child
/// is to be in and then ends.
async fn spawn_in(
    command: Command,
    netns: Option<OwnedFd>,
    namespaces: CloneFlags,
) -> io::Result<Child> {
    let (done, spawned) = oneshot::channel();
    let runtime = Handle::current();
    thread::Builder::new()
        .name("shim-spawn".into())
        .spawn(move || {
            let _entered = runtime.enter();
            let entered = match netns {
                Some(netns) => setns(netns, CloneFlags::CLONE_NEWNET),
                None => Ok(()),
            };
            let result = entered
                .and_then(|()| unshare(namespaces))
                .map_err(io::Error::from)
                .and_then(|()| tokio::process::Command::from(command).spawn());
            if let Err(Ok(mut orphan)) = done.send(result)
                && let Err(error) = orphan.start_kill()
            {
                tracing::warn!(%error, "cannot end a supervisor given up");
            }
        })?;
    spawned
        .await
        .map_err(|_| io::Error::other("the spawning thread panicked"))?
}
