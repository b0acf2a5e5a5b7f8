//! One node: a registry with images, CNI configuration and the CRI server
//! under test, in a directory, a network namespace and a cgroup of its own.
//!
//! The server can be stopped, killed and started again while everything
//! around it stays. Debian's containerd can stand in for drupe, which is how
//! benchmarks compare and how the harness is checked against another runtime.

mod builder;
mod config;
mod containerd;
mod programs;
mod server;
mod small_root;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use cri_api::v1::{
    ListContainersRequest, ListPodSandboxRequest, RemovePodSandboxRequest, StopPodSandboxRequest,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::cgroup::Cgroup;
use crate::guard::Guard;
use crate::machine::slowness;
use crate::netns::NetNs;
use crate::registry::{Access, Registry};
use crate::{Cri, artifacts, leaks, output, reaper};

pub use builder::{NodeBuilder, Server};
pub use config::{BRIDGE, SUBNET_V4, SUBNET_V6};
pub use containerd::shim_sockets;

/// The image that every node's registry has.
pub const BUSYBOX: &str = "127.0.0.1:5000/busybox:latest";

/// What crictl may take for a call.
const CRICTL_SECONDS: u32 = 60;

pub struct Node {
    pub dir: PathBuf,
    pub netns: Arc<NetNs>,
    pub server: Server,
    without_kvm: AtomicBool,
    without_filters: AtomicBool,
    cgroup: Arc<Cgroup>,
    /// Links and host port rules that are there without any pod.
    standing_links: Vec<String>,
    standing_rules: Vec<String>,
    /// The plugins' bridge, when it is on the machine's network and so does
    /// not go with the node's.
    bridge_to_remove: Option<&'static str>,
    registry: Option<Registry>,
    process: Mutex<Option<Child>>,
    cri: Mutex<Option<Cri>>,
    /// Where the node's own copies of the programs are, if it has them.
    programs: Option<PathBuf>,
    guard: Option<Guard>,
    finished: bool,
}

impl Node {
    /// A node with the usual configuration, its server answering.
    pub fn start() -> Result<Self> {
        NodeBuilder::default().start()
    }

    #[must_use]
    pub fn builder() -> NodeBuilder {
        NodeBuilder::default()
    }

    /// The client of the server that runs, or that will be started again.
    pub fn cri(&self) -> Result<Cri> {
        lock(&self.cri)
            .clone()
            .context("the server was not started")
    }

    pub fn registry(&self) -> Result<&Registry> {
        self.registry.as_ref().context("this node has no registry")
    }

    /// One more registry, on the storage of the first.
    pub fn start_registry(&self, address: &str, access: &Access) -> Result<Registry> {
        Registry::start(
            &self.registry_dir(),
            &self.netns,
            &self.cgroup,
            address,
            access,
        )
    }

    #[must_use]
    pub fn registry_dir(&self) -> PathBuf {
        self.dir.join("registry")
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("cri.sock")
    }

    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// Where host-local keeps its leases.
    #[must_use]
    pub fn ipam_dir(&self) -> PathBuf {
        self.dir.join("ipam")
    }

    #[must_use]
    pub fn cni_dir(&self) -> PathBuf {
        self.dir.join("cni")
    }

    /// Where a test puts CNI plugins of its own.
    #[must_use]
    pub fn plugin_dir(&self) -> PathBuf {
        self.dir.join("plugins")
    }

    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.dir.join("config")
    }

    /// Where drupe names the pods' network namespaces.
    #[must_use]
    pub fn netns_dir(&self) -> PathBuf {
        self.dir.join("netns")
    }

    pub fn write_cni(&self, conflist: &Value) -> Result<()> {
        let path = self.cni_dir().join("10-e2e.conflist");
        // A watcher must not see half a file.
        let new = self.dir.join("conflist.new");
        fs::write(&new, conflist.to_string()).with_context(|| new.display().to_string())?;
        fs::rename(&new, &path).with_context(|| path.display().to_string())
    }

    /// The conflist that nodes have unless a test says otherwise.
    #[must_use]
    pub fn default_cni(&self) -> Value {
        config::cni(&self.ipam_dir(), BRIDGE)
    }

    /// An executable in [`Self::plugin_dir`].
    pub fn write_plugin(&self, name: &str, script: &str) -> Result<()> {
        let path = self.plugin_dir().join(name);
        fs::write(&path, script).with_context(|| path.display().to_string())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    pub fn write_config(&self, text: &str) -> Result<()> {
        fs::write(self.config_file(), text).context("write the server's configuration")
    }

    /// Edits the daemon's configuration, as [`NodeBuilder::config`] does, where
    /// the edit needs the node's directory. Read when the server starts.
    pub fn edit_config(&self, edit: impl FnOnce(&mut Value)) -> Result<()> {
        if self.server != Server::Drupe {
            return Ok(());
        }
        let text = fs::read(self.config_file()).context("read the server's configuration")?;
        // YAML, but written as JSON.
        let mut config = serde_json::from_slice(&text).context("the server's configuration")?;
        edit(&mut config);
        self.write_config(&config.to_string())
    }

    /// Runs crictl against this node.
    pub fn crictl(&self, args: &[&str]) -> Result<Output> {
        let endpoint = format!("unix://{}", self.socket().display());
        Command::new(artifacts::crictl()?)
            .args([
                "--config",
                "/dev/null",
                "--timeout",
                &format!("{}s", CRICTL_SECONDS * slowness()),
                "-r",
                &endpoint,
                "-i",
                &endpoint,
            ])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .context("crictl")
    }

    /// What crictl prints when it succeeds.
    pub fn crictl_ok(&self, args: &[&str]) -> Result<String> {
        let output = self.crictl(args)?;
        let said = output::of_success("crictl", args, &output)?;
        Ok(said.trim_end().to_owned())
    }

    /// Processes that the server has started and which run, by id.
    pub fn pod_processes(&self) -> Result<std::collections::BTreeMap<u32, String>> {
        let mut processes = self.cgroup.processes()?;
        for own in self.own_processes() {
            processes.remove(&own);
        }
        Ok(processes)
    }

    /// Kills what the server has started, as a crash would.
    pub fn kill_pod_processes(&self) -> Result<()> {
        for pid in self.pod_processes()?.into_keys() {
            match kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL) {
                // One's death may have been the other's.
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => return Err(error).with_context(|| format!("kill {pid}")),
            }
        }
        Ok(())
    }

    /// The cgroup that the kubelet would have made for pods.
    #[must_use]
    pub fn pods_cgroup(&self) -> String {
        self.cgroup.pods_parent()
    }

    fn own_processes(&self) -> Vec<u32> {
        // Registries other than the first end with the variable that owns them.
        let server = lock(&self.process).as_ref().map(Child::id);
        self.registry
            .as_ref()
            .map(Registry::pid)
            .into_iter()
            .chain(server)
            .collect()
    }

    /// Removes all pods, ends the server, and fails unless nothing is left.
    pub fn finish(mut self) -> Result<()> {
        self.remove_all_pods()?;
        self.stop_server()?;
        self.assert_nothing_left()?;
        self.finished = true;
        self.tear_down()
    }

    /// The end of a node whose server is not running.
    pub fn finish_without_server(mut self) -> Result<()> {
        self.assert_nothing_left()?;
        self.finished = true;
        self.tear_down()
    }

    pub fn remove_all_pods(&self) -> Result<()> {
        let cri = self.cri()?;
        for pod in cri
            .list_pod_sandbox(ListPodSandboxRequest::default())?
            .items
        {
            cri.stop_pod_sandbox(StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            })?;
            cri.remove_pod_sandbox(RemovePodSandboxRequest {
                pod_sandbox_id: pod.id,
            })?;
        }
        let containers = cri
            .list_containers(ListContainersRequest::default())?
            .containers;
        ensure!(
            containers.is_empty(),
            "containers outlive their pods: {containers:?}"
        );
        let pods = cri
            .list_pod_sandbox(ListPodSandboxRequest::default())?
            .items;
        ensure!(pods.is_empty(), "removed pods are still listed: {pods:?}");
        Ok(())
    }

    /// What pods that run hold on the machine, each as a line for people:
    /// compared with what it was, it tells what those that came and went have
    /// left. Stopped ones may keep files such as the console's log until they
    /// are removed, which the kubelet does once a minute.
    pub fn held_by_pods(&self) -> Result<BTreeSet<String>> {
        let held = leaks::found(&self.leak_scope(&[]))?;
        Ok(held.into_iter().collect())
    }

    /// Fails with what removed pods have left, unless it is nothing. The
    /// server may run.
    pub fn assert_no_pod_left(&self) -> Result<()> {
        leaks::assert_none(&self.leak_scope_of_removed(&[]))
    }

    /// Like [`Self::assert_no_pod_left`] while the test has mounted a file
    /// system of its own at `point`.
    pub fn assert_no_pod_left_on(&self, point: &Path) -> Result<()> {
        let mut scope = self.leak_scope_of_removed(&[]);
        scope.standing_mount = Some(point);
        leaks::assert_none(&scope)
    }

    /// Fails unless stopped pods hold no process, mount, link, address or disk;
    /// they may keep files such as the console's log until they are removed.
    pub fn assert_no_running_pod_left(&self) -> Result<()> {
        leaks::assert_none(&self.leak_scope(&[]))
    }

    /// Fails with what server and pods have left, unless it is nothing.
    pub fn assert_nothing_left(&self) -> Result<()> {
        ensure!(
            !self.socket().exists(),
            "the socket of the server that ended is still there"
        );
        let run_dir = self.run_dir();
        leaks::assert_none(&self.leak_scope_of_removed(&[run_dir.as_path()]))
    }

    /// With what stopped pods keep: their directories, and their notes of which
    /// images they use.
    fn leak_scope_of_removed<'a>(&'a self, volatile_dirs: &'a [&'a Path]) -> leaks::Scope<'a> {
        let mut scope = self.leak_scope(volatile_dirs);
        scope.of_pods.extend([
            self.run_dir().join("pods"),
            self.root().join("images/leases"),
        ]);
        scope
    }

    fn leak_scope<'a>(&'a self, volatile_dirs: &'a [&'a Path]) -> leaks::Scope<'a> {
        leaks::Scope {
            dir: &self.dir,
            volatile_dirs,
            standing_mount: None,
            of_pods: vec![
                self.netns_dir(),
                self.root().join("scratch"),
                self.root().join("cni"),
            ],
            ipam_dir: self.ipam_dir(),
            cgroup: &self.cgroup,
            netns: &self.netns,
            standing_links: &self.standing_links,
            standing_rules: &self.standing_rules,
            own_processes: self.own_processes(),
        }
    }

    /// Ends every process, undoes every mount. The directory goes unless the
    /// node failed.
    fn tear_down(&mut self) -> Result<()> {
        self.registry = None;
        self.cgroup.kill()?;
        if let Some(mut child) = lock(&self.process).take() {
            child.wait().context("reap the server")?;
        }
        reaper::forget(&self.cgroup);
        containerd::remove_shim_sockets(&self.run_dir())?;
        for point in leaks::mount_points(&self.dir)? {
            nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH)
                .with_context(|| format!("unmount {}", point.display()))?;
        }
        if let Some(bridge) = self.bridge_to_remove.take()
            && self.netns.links()?.iter().any(|link| link == bridge)
        {
            self.netns.output("ip", &["link", "delete", bridge])?;
        }
        // What it would do is done.
        self.guard = None;
        if self.finished {
            fs::remove_dir_all(&self.dir).with_context(|| self.dir.display().to_string())?;
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        eprintln!(
            "node {} failed; the end of its server's log:\n{}",
            self.dir.display(),
            self.log_tail()
        );
        if let Err(error) = self.tear_down() {
            eprintln!("node {}: tear down: {error:#}", self.dir.display());
        }
        // Storage is large and says little about what went wrong.
        for bulk in ["root", "registry"] {
            let _ = fs::remove_dir_all(self.dir.join(bulk));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
