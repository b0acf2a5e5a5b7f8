//! etcd, the API server, the controllers and the scheduler.

use std::time::Duration;

use anyhow::Result;

use super::NODE_ADDRESS;
use super::files::{API_PORT, Files};
use super::program::{Program, Programs};
use crate::{Node, eventually};

const START_WITHIN: Duration = Duration::from_secs(90);

const ETCD: &str = "http://127.0.0.1:2379";
const ETCD_PEER: &str = "http://127.0.0.1:2380";

pub struct ControlPlane {
    // In the order in which they end.
    scheduler: Program,
    controllers: Program,
    api: Program,
    etcd: Program,
}

impl ControlPlane {
    /// Waits until the API server is ready.
    pub fn start(node: &Node, files: &Files, programs: &Programs) -> Result<Self> {
        let start =
            |name, args: Vec<String>| Program::start(name, node, programs, &files.dir, &args);
        let file = |name: &str| files.dir.join(name).display().to_string();
        let etcd = start(
            "etcd",
            flags(&[
                ("data-dir", &file("etcd")),
                ("listen-client-urls", ETCD),
                ("advertise-client-urls", ETCD),
                ("listen-peer-urls", ETCD_PEER),
                ("initial-advertise-peer-urls", ETCD_PEER),
                ("initial-cluster", &format!("default={ETCD_PEER}")),
                // What is lost with the machine is lost on purpose.
                ("unsafe-no-fsync", "true"),
            ]),
        )?;
        let token_key = files.tokens.key.display().to_string();
        let authority = files.authority.display().to_string();
        let mut api = start(
            "kube-apiserver",
            flags(&[
                ("etcd-servers", ETCD),
                ("bind-address", "0.0.0.0"),
                ("advertise-address", NODE_ADDRESS),
                ("secure-port", &API_PORT.to_string()),
                (
                    "tls-cert-file",
                    &files.serving.certificate.display().to_string(),
                ),
                (
                    "tls-private-key-file",
                    &files.serving.key.display().to_string(),
                ),
                ("client-ca-file", &authority),
                ("authorization-mode", "Node,RBAC"),
                ("allow-privileged", "true"),
                ("service-cluster-ip-range", "10.96.0.0/16"),
                (
                    "service-account-key-file",
                    &files.tokens.certificate.display().to_string(),
                ),
                ("service-account-signing-key-file", &token_key),
                (
                    "service-account-issuer",
                    "https://kubernetes.default.svc.cluster.local",
                ),
                (
                    "kubelet-client-certificate",
                    &files.to_kubelet.certificate.display().to_string(),
                ),
                (
                    "kubelet-client-key",
                    &files.to_kubelet.key.display().to_string(),
                ),
                ("kubelet-certificate-authority", &authority),
                (
                    "kubelet-preferred-address-types",
                    "InternalIP,ExternalIP,Hostname",
                ),
            ]),
        )?;
        eventually("the API server to be ready", START_WITHIN, || {
            // One that has ended is waited for in vain.
            if let Err(ended) = api.check() {
                return Ok(Err(ended));
            }
            let ready = files.kubectl(node, &["get", "--raw=/readyz"], None)?;
            Ok::<_, anyhow::Error>(Ok(ready))
        })??;
        let controllers = start(
            "kube-controller-manager",
            flags(&[
                (
                    "kubeconfig",
                    &files
                        .kubeconfig("kube-controller-manager")
                        .display()
                        .to_string(),
                ),
                ("bind-address", "127.0.0.1"),
                ("cert-dir", &file("controllers")),
                ("leader-elect", "false"),
                ("use-service-account-credentials", "true"),
                ("service-account-private-key-file", &token_key),
                ("root-ca-file", &authority),
            ]),
        )?;
        let scheduler = start(
            "kube-scheduler",
            flags(&[
                (
                    "kubeconfig",
                    &files.kubeconfig("kube-scheduler").display().to_string(),
                ),
                ("bind-address", "127.0.0.1"),
                ("cert-dir", &file("scheduler")),
                ("leader-elect", "false"),
            ]),
        )?;
        Ok(Self {
            scheduler,
            controllers,
            api,
            etcd,
        })
    }

    pub fn stop(self) -> Result<()> {
        self.scheduler.stop()?;
        self.controllers.stop()?;
        self.api.stop()?;
        self.etcd.stop()
    }
}

pub(super) fn flags(flags: &[(&str, &str)]) -> Vec<String> {
    let flag = |(name, value): &(&str, &str)| format!("--{name}={value}");
    flags.iter().map(flag).collect()
}
