//! How a node differs from the usual one, and putting it together.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{BRIDGE, Node, config};
use crate::cgroup::Cgroup;
use crate::guard::Guard;
use crate::image::{self, Image};
use crate::netns::NetNs;
use crate::registry::{self, Access};
use crate::{leaks, reaper};

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
    without_kvm: bool,
    without_registry: bool,
    own_programs: bool,
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
        Self {
            server,
            machine_network: false,
            without_kvm: false,
            without_registry: false,
            own_programs: false,
            config: Vec::new(),
            cni: Vec::new(),
        }
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

    /// Gives the node copies of drupe's programs, so that it can be upgraded.
    #[must_use]
    pub fn own_programs(mut self) -> Self {
        self.own_programs = true;
        self
    }

    /// Keeps the server from opening /dev/kvm.
    #[must_use]
    pub fn without_kvm(mut self) -> Self {
        self.without_kvm = true;
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

    /// Has the network list end with one more plugin: see
    /// [`Node::write_plugin`].
    #[must_use]
    pub fn plugin(self, kind: &'static str) -> Self {
        self.cni(move |conflist| {
            if let Some(plugins) = conflist["plugins"].as_array_mut() {
                plugins.push(json!({ "type": kind }));
            }
        })
    }

    pub fn start(self) -> Result<Node> {
        let node = self.prepare()?;
        node.start_server()?;
        Ok(node)
    }

    /// Everything but the server.
    pub fn prepare(self) -> Result<Node> {
        let name = format!(
            "drupe-e2e-{}-{}",
            std::process::id(),
            NODES.fetch_add(1, Ordering::Relaxed)
        );
        let dir = std::env::temp_dir().join(&name);
        for sub in ["", "root", "run", "netns", "cni", "plugins", "ipam", "logs"] {
            let path = dir.join(sub);
            fs::create_dir(&path).with_context(|| path.display().to_string())?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        let netns = if self.machine_network {
            NetNs::of_this_machine()
        } else {
            NetNs::isolated()?
        };
        let netns = Arc::new(netns);
        let cgroup = Arc::new(Cgroup::create(&name)?);
        reaper::watch(&cgroup)?;
        let bridge = if self.machine_network {
            config::MACHINE_BRIDGE
        } else {
            BRIDGE
        };
        let mut standing_links = netns.links()?;
        standing_links.push(bridge.to_owned());
        let mut node = Node {
            server: self.server,
            without_kvm: AtomicBool::new(self.without_kvm),
            without_filters: AtomicBool::new(false),
            standing_links,
            standing_rules: leaks::port_forwards(&netns)?,
            bridge_to_remove: self.machine_network.then_some(bridge),
            registry: None,
            process: Mutex::new(None),
            cri: Mutex::new(None),
            programs: self.own_programs.then(|| dir.join("bin")),
            guard: Some(Guard::start(&dir, &cgroup, &[])?),
            finished: false,
            dir,
            netns,
            cgroup,
        };

        node.install_programs()?;

        let mut conflist = config::cni(&node.ipam_dir(), bridge);
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

/// Built once per process: compressing takes its time.
fn busybox() -> Result<&'static Image> {
    static BUSYBOX: OnceLock<Image> = OnceLock::new();
    if let Some(image) = BUSYBOX.get() {
        return Ok(image);
    }
    let image = image::busybox()?;
    Ok(BUSYBOX.get_or_init(|| image))
}
