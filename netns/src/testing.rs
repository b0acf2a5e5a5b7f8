//! A host of the test's own: a network and a mount namespace around the test's
//! thread, which the processes that it starts inherit. Whatever a test leaves
//! behind goes with its thread.

use std::{fs, path::Path, process::Command, time::Duration};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use serde_json::json;

use crate::{
    Netns,
    cni::{Cni, CniOptions, NetworkList, PodNetwork},
};

pub(crate) mod guest;

pub(crate) struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    pub(crate) fn enter() -> Self {
        let dir = tempfile::tempdir().unwrap();
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
        run("ip", &["link", "set", "lo", "up"]);
        Self { dir }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// This thread's mounts.
    pub(crate) fn mounts(&self) -> String {
        fs::read_to_string("/proc/thread-self/mounts").unwrap()
    }
}

impl Drop for Host {
    /// A directory with a mount in it cannot be removed.
    fn drop(&mut self) {
        for line in self.mounts().lines() {
            let Some(target) = line.split_whitespace().nth(1) else {
                continue;
            };
            if Path::new(target).starts_with(self.dir())
                && let Err(errno) = umount2(target, MntFlags::MNT_DETACH)
            {
                eprintln!("{target} stays: {errno}");
            }
        }
    }
}

/// Runs iproute2's `ip` in the namespace at a path (its own `-n` only takes
/// names in /run/netns).
pub(crate) fn ip(netns: &Path, command: &str) -> String {
    let net = format!("--net={}", netns.display());
    let mut arguments = vec![net.as_str(), "ip"];
    arguments.extend(command.split_whitespace());
    run("nsenter", &arguments)
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Debian's plugins.
pub(crate) const PLUGINS: &str = "/usr/lib/cni";

/// The network that kubeadm's users know, with its leases inside the test's
/// directory.
pub(crate) fn bridge_network(host: &Host) -> NetworkList {
    let config = json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
                "mtu": 1400,
                "ipam": {
                    "type": "host-local",
                    "dataDir": host.dir().join("leases"),
                    "ranges": [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
            {"type": "bandwidth", "capabilities": {"bandwidth": true}},
        ],
    });
    NetworkList::parse(Path::new("10-pods.conflist"), config.to_string().as_bytes()).unwrap()
}

/// A runtime whose plugins are Debian's and those in `bin` of the test's
/// directory.
pub(crate) fn cni(host: &Host) -> Cni {
    cni_in(host.dir())
}

/// The same in the directory of another process's test.
pub(crate) fn cni_in(dir: &Path) -> Cni {
    Cni::new(CniOptions {
        bin_dirs: vec![dir.join("bin"), PLUGINS.into()],
        record_dir: dir.join("records"),
        timeout: Duration::from_secs(20),
    })
}

pub(crate) fn pod(sandbox_id: &str, netns: &Netns) -> PodNetwork {
    PodNetwork {
        sandbox_id: sandbox_id.to_owned(),
        netns: netns.path().to_owned(),
        interface: "eth0".to_owned(),
        pod_namespace: "default".to_owned(),
        pod_name: sandbox_id.to_owned(),
        pod_uid: format!("uid-{sandbox_id}"),
        port_mappings: Vec::new(),
        bandwidth: None,
        dns: None,
    }
}
