//! A runtime with real plugins: Debian's, and scripts of a test's own. What the
//! tests share is here.

mod attachments;
mod plugins;
mod restart;

use std::{fs, os::unix::fs::PermissionsExt};

use super::*;
use crate::{
    Netns,
    testing::{Host, bridge_network, run},
};

/// All that a pod's network may leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Census {
    links: Vec<String>,
    leases: Vec<String>,
    rules: Vec<String>,
    records: Vec<String>,
    mounts: Vec<String>,
}

fn census(host: &Host) -> Census {
    let words = |text: String, n: usize| -> Vec<String> {
        text.lines()
            .filter_map(|line| line.split_whitespace().nth(n).map(str::to_owned))
            .collect()
    };
    let mut rules = Vec::new();
    for program in ["iptables-save", "ip6tables-save"] {
        let saved = run(program, &[]);
        // Without comments, which hold the time, and counters.
        rules.extend(
            saved
                .lines()
                .filter(|l| l.starts_with("-A"))
                .map(str::to_owned),
        );
    }
    Census {
        links: words(run("ip", &["-o", "link"]), 1),
        leases: leases(host),
        rules,
        records: names(&host.dir().join("records")),
        // Only this test's: others' go when their mount points are removed.
        mounts: host
            .mounts()
            .lines()
            .filter(|line| line.contains(host.dir().to_str().unwrap()))
            .map(str::to_owned)
            .collect(),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The addresses that host-local holds for the network `pods`.
fn leases(host: &Host) -> Vec<String> {
    let mut names = names(&host.dir().join("leases/pods"));
    names.retain(|name| !name.starts_with("last_reserved") && name != "lock");
    names
}

fn script(host: &Host, name: &str, text: &str) {
    let text = format!("cd {}\n{text}", host.dir().display());
    executable(&host.dir().join("bin").join(name), &text);
}

fn executable(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// `bridge_network`'s bridge followed by plugins of the test's own.
fn bridge_then(host: &Host, version: &str, kinds: &[&str]) -> NetworkList {
    let bridge = bridge_network(host).plugins[0].config.clone();
    let mut plugins = vec![Value::Object(bridge)];
    plugins.extend(kinds.iter().map(|kind| json!({"type": kind})));
    only(version, &json!(plugins))
}

fn only(version: &str, plugins: &Value) -> NetworkList {
    let config = json!({"cniVersion": version, "name": "pods", "plugins": plugins});
    NetworkList::parse(Path::new("t.conflist"), config.to_string().as_bytes()).unwrap()
}

/// The host's port, forwarded to a pod's web server.
fn forwarded(host_port: u16) -> PortMapping {
    PortMapping {
        host_port: host_port.try_into().unwrap(),
        container_port: 80.try_into().unwrap(),
        protocol: Protocol::Tcp,
        host_ip: None,
    }
}

async fn netns(host: &Host, name: &str) -> Netns {
    Netns::create(&host.dir().join("netns"), name)
        .await
        .unwrap()
}

async fn collect(cni: &Cni, network: Option<&NetworkList>, valid: &BTreeSet<Attachment>) {
    let collection = cni.begin_gc(valid.clone()).await.unwrap();
    collection.finish(network).await.unwrap();
}
