//! A cluster of one node: Kubernetes' own control plane, its kubelet and drupe,
//! in the network namespace of a [`Node`].
//!
//! What talks to what: kubectl and the kubelet to the API server by
//! certificates of the cluster's own authority, the API server to etcd on
//! loopback and to the kubelet, the kubelet to drupe by its socket. kube-proxy
//! and CoreDNS are pods of the node.

mod addons;
mod control_plane;
mod files;
pub mod images;
mod kubectl;
mod kubelet;
mod program;
mod runtimeclass;
mod sysctls;

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{Node, Server, cgroup, eventually};
use control_plane::ControlPlane;
use files::Files;
use kubelet::Kubelet;
use program::Programs;
use sysctls::Sysctls;

pub use addons::SYSTEM;
pub use kubectl::Namespace;

/// The node's name in the cluster.
pub const NODE: &str = "node-1";
/// The node's own address, on a link of its own: pods reach it by their
/// gateway.
pub const NODE_ADDRESS: &str = "192.0.2.1";
const NODE_LINK: &str = "node0";

/// The RuntimeClass of pods in a microVM, and drupe's handler.
pub const HANDLER: &str = "microvm";
/// What pods that are resized may grow by.
const HEADROOM_MIB: u32 = 512;

const READY_WITHIN: Duration = Duration::from_secs(60);

pub struct Cluster {
    // In the order in which they end.
    kubelet: Option<Kubelet>,
    control_plane: Option<ControlPlane>,
    programs: Option<Programs>,
    files: Files,
    node: Option<Node>,
    overhead_mib: u64,
    _sysctls: Sysctls,
}

impl Cluster {
    /// A cluster whose node is ready.
    pub fn start(server: Server) -> Result<Self> {
        let sysctls = Sysctls::save()?;
        let node = Node::builder()
            .server(server)
            .own_programs()
            .config(|config| {
                config["runtimes"][HANDLER]["memory_headroom_mib"] = HEADROOM_MIB.into()
            })
            .start()?;
        node.pull_busybox()?;
        let address = format!("{NODE_ADDRESS}/24");
        for args in [
            &["link", "add", NODE_LINK, "type", "bridge"][..],
            &["addr", "add", &address, "dev", NODE_LINK],
            &["link", "set", NODE_LINK, "up"],
        ] {
            node.netns.output("ip", args)?;
        }
        let programs = Programs::of(&node, &sysctls)?;
        let files = Files::write(&node, &programs)?;
        // Images are made while others start.
        let images = thread::spawn(addons::Images::make);
        let mut cluster = Self {
            kubelet: None,
            control_plane: Some(ControlPlane::start(&node, &files, &programs)?),
            programs: Some(programs),
            files,
            node: Some(node),
            overhead_mib: 0,
            _sysctls: sysctls,
        };
        cluster.start_kubelet()?;
        eventually("the node to be ready", READY_WITHIN, || {
            let status = cluster.kubectl(&[
                "get",
                "node",
                NODE,
                "-o",
                "jsonpath={.status.conditions[?(@.type==\"Ready\")]['status','message']}",
            ])?;
            ensure!(status.starts_with("True"), "{status}");
            Ok::<_, anyhow::Error>(())
        })?;
        if server == Server::Drupe {
            cluster.overhead_mib = cluster.install_runtime_class()?;
        }
        let images = images
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        cluster.start_addons(&images)?;
        Ok(cluster)
    }

    pub fn node(&self) -> Result<&Node> {
        self.node.as_ref().context("the node has ended")
    }

    /// What the RuntimeClass [`HANDLER`] declares, in MiB of memory.
    #[must_use]
    pub fn overhead_mib(&self) -> u64 {
        self.overhead_mib
    }

    pub fn start_kubelet(&mut self) -> Result<()> {
        let programs = self.programs.as_ref().context("the cluster has ended")?;
        let kubelet = Kubelet::start(self.node()?, &self.files, programs)?;
        self.kubelet = Some(kubelet);
        Ok(())
    }

    /// Asks the kubelet to end, and waits for it. Its pods run on.
    pub fn stop_kubelet(&mut self) -> Result<()> {
        match self.kubelet.take() {
            Some(kubelet) => kubelet.stop(),
            None => Ok(()),
        }
    }

    /// Ends everything, and fails unless nothing is left on the machine.
    pub fn finish(mut self) -> Result<()> {
        // What would make pods anew goes first, and takes its pods with it.
        for (what, how) in [
            ("daemonsets,deployments", "--cascade=foreground"),
            ("pods", "--now"),
        ] {
            self.kubectl(&["delete", what, "--all-namespaces", "--all", how])?;
        }
        self.stop_kubelet()?;
        if let Some(control_plane) = self.control_plane.take() {
            control_plane.stop()?;
        }
        self.programs = None;
        let node = self.node.take().context("the node has ended")?;
        // Pods that the kubelet had no time to remove.
        node.remove_all_pods()?;
        self.files.clear()?;
        // The kubelet keeps its groups of pods for the next one.
        let kubepods = format!("{}/kubepods", node.pods_cgroup());
        for group in cgroup::groups(kubepods.trim_start_matches('/'))? {
            cgroup::remove_tree(&group)?;
        }
        node.netns.output("ip", &["link", "delete", NODE_LINK])?;
        node.finish()
    }

    /// Where the kubelet keeps the logs of containers.
    #[must_use]
    pub fn pod_logs(&self) -> PathBuf {
        self.files.pod_logs()
    }

    /// Where the logs of everything are.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.files.dir.clone()
    }
}
