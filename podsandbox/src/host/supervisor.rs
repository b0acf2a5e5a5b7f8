//! Starts a pod's supervisor in the pod's namespaces.
//!
//! It is handed the listening ends of its sockets, so that whoever knows the
//! pod's id can reach and end it from its first moment on; and it does nothing
//! before it is asked to, by when it is in its control group.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use tokio::process::Child;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::spec::HostNamespaces;
use crate::{Error, Result};

/// What a supervisor is given.
pub struct Request {
    /// The `drupe-shim` program.
    pub program: PathBuf,
    pub pod: String,
    pub dir: PathBuf,
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
    let id = child.id().unwrap_or(0).to_string();
    for path in cgroup_procs {
        let joined = fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(id.as_bytes()));
        if let Err(source) = joined {
            // Killed and reaped: nothing was asked of it yet.
            if let Err(error) = child.kill().await {
                tracing::warn!(%error, "cannot end a supervisor given up");
            }
            return Err(Error::File {
                what: "control group",
                path,
                source,
            });
        }
    }
    Ok(child)
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
