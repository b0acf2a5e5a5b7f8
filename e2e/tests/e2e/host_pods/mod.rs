//! Pods that share the node's kernel, because they share its network, IPC or
//! process ids or because they ask for it: kube-proxy, network plugins, node
//! agents.

mod handler;
mod lifecycle;
mod limits;
mod mounts;
mod namespaces;
mod processes;
pub(crate) mod security;
mod streams;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::pod::{IDLE, security};
use e2e::{Container, Node, Pod};

const PATIENCE: Duration = Duration::from_secs(20);
const HANDLER: &str = "host";

/// What a pod shares with the node.
#[derive(Clone, Copy, Default)]
pub struct Shared {
    network: bool,
    ipc: bool,
    pid: bool,
}

pub const NETWORK: Shared = Shared {
    network: true,
    ipc: false,
    pid: false,
};

impl Shared {
    fn options(self) -> NamespaceOption {
        let mode = |shared, own: NamespaceMode| match shared {
            true => NamespaceMode::Node.into(),
            false => own.into(),
        };
        NamespaceOption {
            network: mode(self.network, NamespaceMode::Pod),
            ipc: mode(self.ipc, NamespaceMode::Pod),
            pid: mode(self.pid, NamespaceMode::Container),
            ..Default::default()
        }
    }
}

fn pod_config(node: &Node, name: &str, shared: Shared) -> PodSandboxConfig {
    let mut config = node.pod_config(name);
    let linux = config.linux.get_or_insert_default();
    linux
        .security_context
        .get_or_insert_default()
        .namespace_options = Some(shared.options());
    config
}

pub fn run(node: &Node, name: &str, shared: Shared) -> Result<Pod> {
    node.run_pod_with(pod_config(node, name, shared))
}

/// A pod of the handler of its name; it shares nothing unless it says so.
fn run_by_handler(node: &Node, config: PodSandboxConfig) -> Result<Pod> {
    fs::create_dir_all(&config.log_directory)?;
    let request = RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: HANDLER.to_owned(),
    };
    let id = node.cri()?.run_pod_sandbox(request)?.pod_sandbox_id;
    Pod::known(node, &id, config)
}

fn container_config(pod: &Pod, name: &str, command: &[&str], shared: Shared) -> ContainerConfig {
    let mut config = pod.container_config(name, command);
    security(&mut config).namespace_options = Some(shared.options());
    config
}

fn idle(pod: &Pod, name: &str, shared: Shared) -> Result<Container> {
    pod.start_with(container_config(pod, name, IDLE, shared))
}

fn kernel(of: &str) -> String {
    of.trim().to_owned()
}

fn namespace(path: &str) -> Result<String> {
    let link = fs::read_link(path).with_context(|| path.to_owned())?;
    Ok(link.display().to_string())
}

/// The pod's supervisor, by process id.
fn supervisor(node: &Node) -> Result<u32> {
    let processes = node.pod_processes()?;
    let of_shim = |line: &&String| line.contains("drupe-shim") && line.contains("supervise");
    let found: BTreeMap<_, _> = processes.iter().filter(|(_, l)| of_shim(l)).collect();
    ensure!(found.len() == 1, "supervisors: {found:?}");
    found
        .keys()
        .next()
        .map(|pid| **pid)
        .context("no supervisor")
}

/// What an HTTP server on the node's loopback answers.
fn get(node: &Node, port: u16, path: &str) -> Result<String> {
    let connect = || Ok(TcpStream::connect(("127.0.0.1", port))?);
    let mut stream = node.netns.run(connect)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn crictl(node: &Node) -> Result<String> {
    let socket = node.socket().display().to_string();
    let crictl = e2e::artifacts::crictl()?;
    Ok(format!(
        "{} --config /dev/null -r unix://{socket} -i unix://{socket}",
        crictl.display()
    ))
}

/// crictl beside the node's network, its streams ours.
fn client(node: &Node, args: &[&str]) -> Result<Child> {
    let line = format!("exec {} \"$@\"", crictl(node)?);
    let mut command = Command::new("sh");
    command
        .args(["-c", &line, "sh"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir(Path::new("/"));
    node.netns.run(|| command.spawn().context("crictl"))
}
