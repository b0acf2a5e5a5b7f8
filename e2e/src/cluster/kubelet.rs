//! The kubelet of the node.

use anyhow::Result;
use serde_json::json;

use super::addons::{DNS_ADDRESS, DOMAIN};
use super::control_plane::flags;
use super::files::{Files, write};
use super::program::{Program, Programs};
use super::{NODE, NODE_ADDRESS};
use crate::Node;

pub struct Kubelet {
    program: Program,
}

impl Kubelet {
    pub fn start(node: &Node, files: &Files, programs: &Programs) -> Result<Self> {
        let config = files.dir.join("kubelet.yaml");
        let resolv = files.dir.join("resolv.conf");
        write(&resolv, "nameserver 192.0.2.1\n")?;
        // YAML holds JSON.
        let text = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": format!("unix://{}", node.socket().display()),
            "authentication": {
                "anonymous": { "enabled": false },
                "webhook": { "enabled": false },
                "x509": { "clientCAFile": files.authority },
            },
            "authorization": { "mode": "AlwaysAllow" },
            "address": "0.0.0.0",
            "healthzBindAddress": "127.0.0.1",
            "tlsCertFile": files.serving.certificate,
            "tlsPrivateKeyFile": files.serving.key,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": node.pods_cgroup(),
            "enforceNodeAllocatable": [],
            "failSwapOn": false,
            // The machine that runs the tests may have version 1.
            "failCgroupV1": false,
            "podLogsDir": files.pod_logs(),
            "volumePluginDir": files.dir.join("plugins"),
            "resolvConf": resolv,
            "clusterDNS": [DNS_ADDRESS],
            "clusterDomain": DOMAIN,
            "makeIPTablesUtilChains": false,
            // However full the machine's disk is.
            "evictionHard": { "memory.available": "0%", "nodefs.available": "0%",
                "nodefs.inodesFree": "0%", "imagefs.available": "0%" },
            "imageGCHighThresholdPercent": 100,
            "syncFrequency": "10s",
            "nodeStatusUpdateFrequency": "2s",
            "maxPods": 110,
        });
        write(&config, &text.to_string())?;
        let program = Program::start(
            "kubelet",
            node,
            programs,
            &files.dir,
            &flags(&[
                ("config", &config.display().to_string()),
                (
                    "kubeconfig",
                    &files.kubeconfig("kubelet").display().to_string(),
                ),
                ("root-dir", &files.kubelet_root().display().to_string()),
                (
                    "cert-dir",
                    &files.dir.join("kubelet-pki").display().to_string(),
                ),
                ("hostname-override", NODE),
                ("node-ip", NODE_ADDRESS),
            ]),
        )?;
        Ok(Self { program })
    }

    pub fn stop(self) -> Result<()> {
        self.program.stop()
    }
}
