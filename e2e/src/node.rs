//! One node: a registry with images, CNI configuration and the CRI server
//! under test, in a directory, a network namespace and a cgroup of its own.
//!
//! The server can be stopped, killed and started again while everything
//! around it stays. Debian's containerd can stand in for drupe, which is how
//! benchmarks compare and how the harness is checked against another runtime.

mod config;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::{
    ListContainersRequest, ListPodSandboxRequest, RemovePodSandboxRequest, StopPodSandboxRequest, VersionRequest,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::cgroup::Cgroup;
use crate::image::{self, Image};
use crate::netns::NetNs;
use crate::registry::{self, Access, Registry};
use crate::{Cri, artifacts, eventually, leaks, reaper};

pub use config::{BRIDGE, SUBNET_V4, SUBNET_V6};

/// The image that every node's registry has.
pub const BUSYBOX: &str = "127.0.0.1:5000/busybox:latest";

const START_WITHIN: Duration = Duration::from_secs(30);
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// Lines of the server's log that a failed test prints.
const LOG_TAIL_LINES: usize = 60;

static NODES: AtomicU32 = AtomicU32::new(0);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    Drupe,
    Containerd,
}

type Edit = Box<dyn FnOnce(&mut Value)>;

pub struct NodeBuilder {
    server: Server,
    machine_network: bool,
    without_registry: bool,
    config: Vec<Edit>,
    cni: Vec<Edit>,
}

impl Default for NodeBuilder {
    fn default() -> Self {
        // The same tests against another runtime, to tell a wrong test from a
        // wrong daemon.
        let server = match std::env::var("E2E_SERVER").as_deref() {
            Ok("containerd") => Server::Containerd,
            _ => Server::Drupe,
        };
        Self { server, machine_network: false, without_registry: false, config: Vec::new(), cni: Vec::new() }
    }
}

impl NodeBuilder {
    #[must_use]
    pub fn server(mut self, server: Server) -> Self {
        self.server = server;
        self
    }

    /// Lets the node reach what this machine reaches, and starts no registry.
    #[must_use]
    pub fn on_the_machines_network(mut self) -> Self {
        self.machine_network = true;
        self.without_registry = true;
        self
    }

    /// Edits the daemon's configuration before it starts.
    #[must_use]
    pub fn config(mut self, edit: impl FnOnce(&mut Value) + 'static) -> Self {
        self.config.push(Box::new(edit));
        self
    }

    /// Edits the CNI network configuration list; null leaves the directory
    /// empty.
    #[must_use]
    pub fn cni(mut self, edit: impl FnOnce(&mut Value) + 'static) -> Self {
        self.cni.push(Box::new(edit));
        self
    }

    pub fn start(self) -> Result<Node> {
        let node = self.prepare()?;
        node.start_server()?;
        Ok(node)
    }

    /// Everything but the server.
    pub fn prepare(self) -> Result<Node> {
        let name = format!("drupe-e2e-{}-{}", std::process::id(), NODES.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(&name);
        for sub in ["", "root", "run", "netns", "cni", "plugins", "ipam", "logs"] {
            let path = dir.join(sub);
            fs::create_dir(&path).with_context(|| path.display().to_string())?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        let netns = if self.machine_network { NetNs::of_this_machine() } else { NetNs::isolated()? };
        let netns = Arc::new(netns);
        let cgroup = Arc::new(Cgroup::create(&name)?);
        reaper::watch(&cgroup)?;
        let mut standing_links = netns.links()?;
        standing_links.push(BRIDGE.to_owned());
        let mut node = Node {
            server: self.server,
            standing_links,
            registry: None,
            process: Mutex::new(None),
            cri: Mutex::new(None),
            finished: false,
            dir,
            netns,
            cgroup,
        };

        let mut conflist = config::cni(&node.ipam_dir(), if self.machine_network { config::MACHINE_BRIDGE } else { BRIDGE });
        if self.machine_network {
            node.standing_links.push(config::MACHINE_BRIDGE.to_owned());
        }
        self.cni.into_iter().for_each(|edit| edit(&mut conflist));
        if !conflist.is_null() {
            node.write_cni(&conflist)?;
        }

        if !self.without_registry {
            let registry = node.start_registry(registry::ADDRESS, &Access::Plain)?;
            registry.push("busybox", "latest", busybox()?)?;
            if node.server == Server::Containerd {
                registry.push("pause", "latest", &image::pause()?)?;
            }
            node.registry = Some(registry);
        }

        match node.server {
            Server::Drupe => {
                let mut config = config::drupe(&node)?;
                self.config.into_iter().for_each(|edit| edit(&mut config));
                // YAML holds JSON.
                node.write_config(&serde_json::to_string_pretty(&config)?)?;
            }
            Server::Containerd => node.write_config(&config::containerd(&node))?,
        }
        Ok(node)
    }
}

pub struct Node {
    pub dir: PathBuf,
    pub netns: Arc<NetNs>,
    pub server: Server,
    cgroup: Arc<Cgroup>,
    standing_links: Vec<String>,
    registry: Option<Registry>,
    process: Mutex<Option<Child>>,
    cri: Mutex<Option<Cri>>,
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
        lock(&self.cri).clone().context("the server was not started")
    }

    pub fn registry(&self) -> Result<&Registry> {
        self.registry.as_ref().context("this node has no registry")
    }

    /// One more registry, on the storage of the first.
    pub fn start_registry(&self, address: &str, access: &Access) -> Result<Registry> {
        Registry::start(&self.registry_dir(), &self.netns, &self.cgroup, address, access)
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

    /// Starts the server and waits until it answers.
    pub fn start_server(&self) -> Result<()> {
        self.spawn_server()?;
        let cri = eventually("the server to answer", START_WITHIN, || {
            if let Some(child) = lock(&self.process).as_mut()
                && let Some(status) = child.try_wait()?
            {
                // Waiting on does not help; the outer check reports it.
                return Ok(Err(anyhow::anyhow!("it ended: {status}\n{}", self.log_tail())));
            }
            std::os::unix::net::UnixStream::connect(self.socket()).context("connect")?;
            let cri = Cri::connect(&self.socket())?;
            cri.version(VersionRequest { version: "v1".into() }).context("Version")?;
            Ok::<_, anyhow::Error>(Ok(cri))
        })??;
        *lock(&self.cri) = Some(cri);
        Ok(())
    }

    fn spawn_server(&self) -> Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(self.log_file()).context("server log")?;
        // The shell joins the cgroup before anything else can be started.
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.cgroup.procs_file());
        match self.server {
            Server::Drupe => command.arg(artifacts::daemon()?).args(["serve", "--config"]).arg(self.config_file()),
            Server::Containerd => command.arg("containerd").arg("--config").arg(self.config_file()),
        };
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
        let child =
            reaper::spawn_own(&self.cgroup, || self.netns.run(|| command.spawn().context("start the server")))?;
        *lock(&self.process) = Some(child);
        Ok(())
    }

    /// Starts a server that is expected to end by itself, and returns what it
    /// said and how it ended.
    pub fn run_server_to_its_end(&self, within: Duration) -> Result<(std::process::ExitStatus, String)> {
        self.spawn_server()?;
        let status = self.wait_server(within)?;
        Ok((status, fs::read_to_string(self.log_file()).context("server log")?))
    }

    /// Asks the server to end (SIGTERM) and waits until it has.
    pub fn stop_server(&self) -> Result<()> {
        self.signal_server(Signal::SIGTERM)?;
        let status = self.wait_server(STOP_WITHIN)?;
        ensure!(status.success(), "the server ended with {status}\n{}", self.log_tail());
        Ok(())
    }

    /// Ends the server without notice (SIGKILL).
    pub fn kill_server(&self) -> Result<()> {
        self.signal_server(Signal::SIGKILL)?;
        self.wait_server(STOP_WITHIN).map(drop)
    }

    fn signal_server(&self, signal: Signal) -> Result<()> {
        let process = lock(&self.process);
        let pid = process.as_ref().context("no server runs")?.id();
        kill(Pid::from_raw(i32::try_from(pid)?), signal).with_context(|| format!("{signal} to the server"))
    }

    fn wait_server(&self, within: Duration) -> Result<std::process::ExitStatus> {
        let status = eventually("the server to end", within, || {
            let mut process = lock(&self.process);
            let child = process.as_mut().context("no server runs")?;
            child.try_wait()?.context("it runs")
        })?;
        *lock(&self.process) = None;
        Ok(status)
    }

    /// Runs crictl against this node.
    pub fn crictl(&self, args: &[&str]) -> Result<Output> {
        let endpoint = format!("unix://{}", self.socket().display());
        Command::new(artifacts::crictl()?)
            .args(["--config", "/dev/null", "--timeout", "60s", "-r", &endpoint, "-i", &endpoint])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .context("crictl")
    }

    /// What crictl prints when it succeeds.
    pub fn crictl_ok(&self, args: &[&str]) -> Result<String> {
        let output = self.crictl(args)?;
        ensure!(
            output.status.success(),
            "crictl {}: {}: {}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
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
        self.registry.as_ref().map(Registry::pid).into_iter().chain(server).collect()
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
        for pod in cri.list_pod_sandbox(ListPodSandboxRequest::default())?.items {
            cri.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() })?;
            cri.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: pod.id })?;
        }
        let containers = cri.list_containers(ListContainersRequest::default())?.containers;
        ensure!(containers.is_empty(), "containers outlive their pods: {containers:?}");
        let pods = cri.list_pod_sandbox(ListPodSandboxRequest::default())?.items;
        ensure!(pods.is_empty(), "removed pods are still listed: {pods:?}");
        Ok(())
    }

    /// Fails with what removed pods have left, unless it is nothing. The
    /// server may run.
    pub fn assert_no_pod_left(&self) -> Result<()> {
        leaks::assert_none(&self.leak_scope(&[&self.netns_dir(), &self.run_dir().join("pods")]))
    }

    /// Fails unless stopped pods hold no process, mount, link or address; they
    /// may keep files such as the console's log until they are removed.
    pub fn assert_no_running_pod_left(&self) -> Result<()> {
        leaks::assert_none(&self.leak_scope(&[&self.netns_dir()]))
    }

    /// Fails with what server and pods have left, unless it is nothing.
    pub fn assert_nothing_left(&self) -> Result<()> {
        ensure!(!self.socket().exists(), "the socket of the server that ended is still there");
        leaks::assert_none(&self.leak_scope(&[&self.netns_dir(), &self.run_dir()]))
    }

    fn leak_scope<'a>(&'a self, volatile_dirs: &'a [&'a Path]) -> leaks::Scope<'a> {
        leaks::Scope {
            dir: &self.dir,
            volatile_dirs,
            ipam_dir: self.ipam_dir(),
            cgroup: &self.cgroup,
            netns: &self.netns,
            standing_links: &self.standing_links,
            own_processes: self.own_processes(),
        }
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join("server.log")
    }

    /// The end of the server's log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.log_file()).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
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
        for point in leaks::mount_points(&self.dir)? {
            nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH)
                .with_context(|| format!("unmount {}", point.display()))?;
        }
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
        eprintln!("node {} failed; the end of its server's log:\n{}", self.dir.display(), self.log_tail());
        if let Err(error) = self.tear_down() {
            eprintln!("node {}: tear down: {error:#}", self.dir.display());
        }
        // Storage is large and says little about what went wrong.
        for bulk in ["root", "registry"] {
            let _ = fs::remove_dir_all(self.dir.join(bulk));
        }
    }
}

/// Built once per process: compressing takes its time.
fn busybox() -> Result<&'static Image> {
    static BUSYBOX: OnceLock<Image> = OnceLock::new();
    if let Some(image) = BUSYBOX.get() {
        return Ok(image);
    }
    let image = image::busybox()?;
    Ok(BUSYBOX.get_or_init(|| image))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
