//! The harness itself.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use e2e::leaks::mount_points;
use e2e::node::shim_sockets;
use e2e::{Node, cgroup};

use crate::shares_the_hosts_kernel;

/// Where containerd's shims listen, whatever directories it is given.
const SHIM_SOCKETS: &str = "/run/containerd/s";

#[test]
fn a_node_whose_test_fails_leaves_nothing_on_the_machine_but_its_logs() -> Result<()> {
    let node = Node::start()?;
    node.pull_busybox()?;
    node.run_pod("abandoned")?.start_idle("c")?;
    let dir = node.dir.clone();
    let processes = node.pod_processes()?;
    ensure!(!processes.is_empty());
    let sockets = shim_sockets(&node.run_dir())?;
    if shares_the_hosts_kernel(&node) {
        let mounts = mount_points(&dir)?;
        let is_netns = |path: &PathBuf| path.to_string_lossy().contains("/netns/cni-");
        ensure!(mounts.iter().any(is_netns), "not in {mounts:?}");
        let is_shims = |path: &PathBuf| path.starts_with(SHIM_SOCKETS);
        ensure!(sockets.iter().any(is_shims), "no shim in {sockets:?}");
    }
    let name = dir
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    drop(node);

    for (pid, line) in processes {
        // Empty for one that is not reaped yet.
        let now = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let now = now.replace('\0', " ");
        ensure!(now.trim_end() != line, "process {pid} still runs: {line}");
    }
    assert_eq!(mount_points(&dir)?, Vec::<PathBuf>::new());
    assert_eq!(cgroup::groups(&name)?, Vec::<PathBuf>::new());
    for socket in sockets {
        ensure!(!socket.exists(), "{} is left", socket.display());
    }
    ensure!(
        dir.join("server.log").exists(),
        "nothing tells what went wrong"
    );
    fs::remove_dir_all(dir)?;
    Ok(())
}
