//! Configuration files of a node: the CRI server's and CNI's.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::Node;
use crate::machine::slowness;
use crate::{Machine, artifacts, registry};

/// The bridge in a node's own network.
pub const BRIDGE: &str = "cni0";
/// The bridge of a node on the machine's network.
pub(super) const MACHINE_BRIDGE: &str = "drupe-demo0";

pub const SUBNET_V4: &str = "10.88.0.0/24";
pub const SUBNET_V6: &str = "fd00:88::/64";

/// A dual-stack bridge with addresses from host-local, host ports and
/// bandwidth limits: what small clusters use.
pub(super) fn cni(ipam_dir: &Path, bridge: &str) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "e2e",
        "plugins": [
            {
                "type": "bridge",
                "bridge": bridge,
                "isDefaultGateway": true,
                "forceAddress": false,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": ipam_dir,
                    "ranges": [[{ "subnet": SUBNET_V4 }], [{ "subnet": SUBNET_V6 }]],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true },
            { "type": "bandwidth", "capabilities": { "bandwidth": true } },
        ],
    })
}

/// Limits of the daemon's own, in seconds: its defaults on a usual machine.
const BOOT_SECONDS: u32 = 30;
const PLUGIN_SECONDS: u32 = 30;

pub(super) fn drupe(node: &Node) -> Result<Value> {
    let machine = Machine::under_test()?;
    Ok(json!({
        "socket": node.socket(),
        "root": node.root(),
        "run_dir": node.run_dir(),
        "log_level": "debug",
        "vmm": node.program("drupe-vmm", artifacts::vmm)?,
        "shim": node.program("drupe-shim", artifacts::shim)?,
        "unpacker": node.program("drupe-unpacker", artifacts::unpacker)?,
        "runtimes": {
            "microvm": {
                "machine": machine.name(),
                "kernel": artifacts::guest_kernel(machine)?,
                "initramfs": artifacts::initramfs()?,
                "boot_timeout_seconds": BOOT_SECONDS * slowness(),
            },
            "host": { "oci": artifacts::oci_runtime() },
        },
        "network": {
            "conf_dir": node.cni_dir(),
            "bin_dirs": [node.plugin_dir(), "/opt/cni/bin", "/usr/lib/cni"],
            "netns_dir": node.dir.join("netns"),
            "plugin_timeout_seconds": PLUGIN_SECONDS * slowness(),
        },
        "images": { "registries": { registry::ADDRESS: { "plain_http": true } } },
    }))
}

pub(super) fn containerd(node: &Node) -> String {
    let dir = node.dir.display();
    format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/run"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs"]
[grpc]
  address = "{dir}/cri.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{registry}/pause:latest"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{dir}/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{dir}/certs.d"
"#,
        registry = registry::ADDRESS,
    )
}
