//! The cluster's directory: certificates, kubeconfigs, the kubelet's state.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use serde_json::json;

use super::program::Programs;
use super::{NODE, NODE_ADDRESS};
use crate::certificates::{Authority, Signed};
use crate::{Node, leaks};

/// Names and addresses at which programs of the cluster are called.
const SERVING: &str = "IP:127.0.0.1,IP:192.0.2.1,IP:10.96.0.1,DNS:localhost,DNS:node-1,\
                       DNS:kubernetes.default.svc,DNS:kubernetes.default,DNS:kubernetes";

pub const API_PORT: u16 = 6443;

pub struct Files {
    pub dir: PathBuf,
    /// How kubectl joins the cluster's programs.
    pub procs_file: PathBuf,
    pub authority: PathBuf,
    /// What the API server and the kubelet show to those who call them.
    pub serving: Signed,
    /// What the API server shows to the kubelet.
    pub to_kubelet: Signed,
    /// Signs the tokens of service accounts.
    pub tokens: Signed,
}

impl Files {
    pub fn write(node: &Node, programs: &Programs) -> Result<Self> {
        let dir = node.dir.join("cluster");
        for sub in ["", "kubelet", "pod-logs", "plugins"] {
            let path = dir.join(sub);
            fs::create_dir(&path).with_context(|| path.display().to_string())?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        let authority = Authority::in_dir(&dir.join("pki"))?;
        let files = Self {
            authority: authority.certificate(),
            serving: authority.sign("serving", "/CN=cluster", SERVING)?,
            to_kubelet: authority.sign("to-kubelet", "/O=system:masters/CN=api", "DNS:api")?,
            tokens: authority.sign("tokens", "/CN=tokens", "DNS:tokens")?,
            dir,
            procs_file: programs.procs_file(),
        };
        for (file, subject) in [
            ("admin", "/O=system:masters/CN=admin".to_owned()),
            (
                "kube-controller-manager",
                "/CN=system:kube-controller-manager".to_owned(),
            ),
            ("kube-scheduler", "/CN=system:kube-scheduler".to_owned()),
            ("kubelet", format!("/O=system:nodes/CN=system:node:{NODE}")),
        ] {
            let signed = authority.sign(file, &subject, &format!("DNS:{file}"))?;
            files.write_kubeconfig(file, &signed)?;
        }
        Ok(files)
    }

    #[must_use]
    pub fn kubeconfig(&self, of: &str) -> PathBuf {
        self.dir.join(format!("{of}.conf"))
    }

    #[must_use]
    pub fn kubelet_root(&self) -> PathBuf {
        self.dir.join("kubelet")
    }

    #[must_use]
    pub fn pod_logs(&self) -> PathBuf {
        self.dir.join("pod-logs")
    }

    fn write_kubeconfig(&self, of: &str, signed: &Signed) -> Result<()> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "e2e", "cluster": {
                "server": format!("https://{NODE_ADDRESS}:{API_PORT}"),
                "certificate-authority": self.authority,
            }}],
            "users": [{ "name": of, "user": {
                "client-certificate": signed.certificate,
                "client-key": signed.key,
            }}],
            "contexts": [{ "name": "e2e", "context": { "cluster": "e2e", "user": of } }],
            "current-context": "e2e",
        });
        write(&self.kubeconfig(of), &config.to_string())
    }

    /// Unmounts what a kubelet that ended has left of its pods' volumes.
    pub fn clear(&self) -> Result<()> {
        for point in leaks::mount_points(&self.dir)? {
            umount2(&point, MntFlags::MNT_DETACH)
                .with_context(|| format!("unmount {}", point.display()))?;
        }
        Ok(())
    }
}

pub fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| path.display().to_string())
}
