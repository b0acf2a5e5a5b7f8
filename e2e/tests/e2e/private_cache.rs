//! Containers that have their images' cached pages for themselves.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use cri_api::v1::PodSandboxStatusRequest;
use e2e::{Node, Pod, Server};
use serde_json::json;
use tonic::Code;

use crate::refused;

fn node() -> Result<Node> {
    Node::builder()
        .server(Server::Drupe)
        .config(|config| config["images"]["private_cache"] = json!(true))
        .prepare()
}

/// Inodes of the layers that the pod's monitor has open, each of a file without
/// a name.
fn clones_of(node: &Node, pod: &Pod) -> Result<BTreeSet<u64>> {
    let status = node.cri()?.pod_sandbox_status(PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    })?;
    let info = status.info.get("info").context("no information")?;
    let info: serde_json::Value = serde_json::from_str(info)?;
    let monitor = info["pid"].as_u64().with_context(|| info.to_string())?;
    let layers = node.root().join("images");
    let mut clones = BTreeSet::new();
    for fd in fs::read_dir(format!("/proc/{monitor}/fd"))?.flatten() {
        let target = fs::read_link(fd.path())?;
        if target.starts_with(&layers) {
            let file = fs::metadata(fd.path())?;
            ensure!(file.nlink() == 0, "{target:?} is the common file");
            clones.insert(file.ino());
        }
    }
    Ok(clones)
}

#[test]
fn each_container_reads_clones_of_its_images_layers() -> Result<()> {
    let node = node()?;
    node.mount_root_with_clones()?;
    node.start_server()?;
    node.pull_busybox()?;
    let pods = [node.run_pod("first")?, node.run_pod("second")?];
    let mut clones = Vec::new();
    for pod in &pods {
        let container = pod.start_idle("one")?;
        container.exec(&["sh", "-c", "cat /bin/busybox > /dev/null"])?;
        clones.push(clones_of(&node, pod)?);
    }
    ensure!(clones.iter().all(|of_pod| !of_pod.is_empty()), "{clones:?}");
    ensure!(clones[0].is_disjoint(&clones[1]), "{clones:?}");
    node.finish_with_small_root()
}

#[test]
fn where_no_file_can_be_cloned_no_container_is_given_less() -> Result<()> {
    let node = node()?;
    node.mount_small_root("512m")?;
    node.start_server()?;
    node.pull_busybox()?;
    let pod = node.run_pod("plain")?;
    let words = ["`images.private_cache`", "Btrfs"];
    let container = pod.create(pod.container_config("one", e2e::pod::IDLE));
    refused(container, Code::FailedPrecondition, &words)?;
    node.finish_with_small_root()
}
