//! Pods that run on while what manages them is restarted.

use anyhow::{Result, ensure};
use e2e::cluster::{Cluster, Namespace, SYSTEM};
use serde_json::json;

use crate::services::Load;
use crate::{IDLE, busybox, pod};

type Scenario = fn(&mut Cluster, &str) -> Result<()>;

pub const SCENARIOS: &[(&str, Scenario)] = &[
    ("the-kubelet-is-restarted", the_kubelet_is_restarted),
    (
        "drupe-is-killed-and-restarted",
        drupe_is_killed_and_restarted,
    ),
    ("drupe-is-upgraded-under-load", drupe_is_upgraded_under_load),
];

const PODS: usize = 3;

fn start_pods(ns: &Namespace<'_>) -> Result<()> {
    for n in 0..PODS {
        let spec =
            json!({ "containers": [busybox("c", IDLE)], "terminationGracePeriodSeconds": 1 });
        ns.apply(&pod(&format!("pod-{n}"), spec))?;
    }
    (0..PODS).try_for_each(|n| ns.wait(&format!("pod/pod-{n}"), "condition=Ready"))
}

/// Restarts and ids of the containers: the same as long as they run.
fn containers(ns: &Namespace<'_>) -> Result<String> {
    ns.field(
        "pods",
        "{range .items[*]}{.status.containerStatuses[0]['restartCount','containerID']} {end}",
    )
}

fn a_pod_more(ns: &Namespace<'_>) -> Result<()> {
    let spec = json!({ "containers": [busybox("c", IDLE)], "terminationGracePeriodSeconds": 1 });
    ns.apply(&pod("later", spec))?;
    ns.wait("pod/later", "condition=Ready")?;
    ns.kubectl(&["delete", "pod/later", "--timeout=60s"])?;
    Ok(())
}

fn the_kubelet_is_restarted(cluster: &mut Cluster, name: &str) -> Result<()> {
    let ns = cluster.namespace(name)?;
    start_pods(&ns)?;
    let before = containers(&ns)?;
    drop(ns);
    cluster.stop_kubelet()?;
    cluster.start_kubelet()?;
    let ns = cluster.existing_namespace(name);
    a_pod_more(&ns)?;
    let after = containers(&ns)?;
    ensure!(before == after, "{before} became {after}");
    Ok(())
}

fn drupe_is_killed_and_restarted(cluster: &mut Cluster, name: &str) -> Result<()> {
    let ns = cluster.namespace(name)?;
    start_pods(&ns)?;
    let before = containers(&ns)?;
    for _ in 0..3 {
        cluster.node()?.kill_server()?;
        cluster.node()?.start_server()?;
        a_pod_more(&ns)?;
    }
    let after = containers(&ns)?;
    ensure!(before == after, "{before} became {after}");
    let said = ns.kubectl(&["exec", "pod-0", "--", "echo", "still here"])?;
    ensure!(said == "still here", "{said}");
    Ok(())
}

fn drupe_is_upgraded_under_load(cluster: &mut Cluster, name: &str) -> Result<()> {
    let ns = cluster.namespace(name)?;
    let load = Load::start(&ns)?;
    // kube-proxy's, on the node's kernel, and CoreDNS' among them.
    let system = cluster.existing_namespace(SYSTEM);
    let all = || anyhow::Ok([containers(&ns)?, containers(&system)?]);
    let before = all()?;
    for _ in 0..3 {
        cluster.node()?.install_programs()?;
        cluster.node()?.kill_server()?;
        // Nobody waits for the daemon.
        load.answered("one ", 10)?;
        cluster.node()?.start_server()?;
        a_pod_more(&ns)?;
        load.answered("one ", 10)?;
    }
    let after = all()?;
    ensure!(before == after, "{before:?} became {after:?}");
    load.update()?;
    load.answered("two ", 10)?;
    load.finish()
}
