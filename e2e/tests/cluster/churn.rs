//! Many pods that come and go, and what they leave: nothing.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::cluster::{NODE, Namespace};
use e2e::eventually;
use serde_json::json;

use crate::{IDLE, busybox, idle_pod};

/// The kubelet clears away in its own time.
const GONE_WITHIN: Duration = Duration::from_secs(120);

fn nothing_is_left(ns: &Namespace<'_>, before: &BTreeSet<String>) -> Result<()> {
    eventually("nothing of the pods to be left", GONE_WITHIN, || {
        let now = ns.node()?.held_by_pods()?;
        let left: Vec<_> = now.difference(before).map(String::as_str).collect();
        ensure!(left.is_empty(), "{} left:\n{}", left.len(), left.join("\n"));
        Ok::<_, anyhow::Error>(())
    })
}

fn create(ns: &Namespace<'_>, names: &[String]) -> Result<()> {
    let pods: Vec<_> = names.iter().map(|name| idle_pod(name)).collect();
    ns.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": pods }))?;
    Ok(())
}

fn all_gone(ns: &Namespace<'_>) -> Result<()> {
    let gone = ["wait", "pods", "--all", "--for=delete", "--timeout=180s"];
    ns.kubectl(&gone).map(drop)
}

/// They begin at once and are deleted one after the other, so each at another
/// moment of its start.
pub fn pods_are_deleted_while_they_start(ns: &Namespace<'_>) -> Result<()> {
    ns.cluster().wait_for_services()?;
    let before = ns.node()?.held_by_pods()?;
    let rounds: &[&[&str]] = &[
        &["--wait=false"],
        // Not even the kubelet is waited for.
        &["--wait=false", "--force", "--grace-period=0"],
    ];
    for (round, how) in rounds.iter().enumerate() {
        let names: Vec<_> = (0..12).map(|n| format!("pod-{round}-{n}")).collect();
        create(ns, &names)?;
        for name in &names {
            ns.kubectl(&[&["delete", "pod", name.as_str()], *how].concat())?;
        }
        all_gone(ns)?;
        nothing_is_left(ns, &before)?;
    }
    Ok(())
}

pub fn forty_pods_run_at_once(ns: &Namespace<'_>) -> Result<()> {
    const PODS: usize = 40;
    ns.cluster().wait_for_services()?;
    let before = ns.node()?.held_by_pods()?;
    let memory = available_mib()?;
    let names: Vec<_> = (0..PODS).map(|n| format!("pod-{n}")).collect();
    let begun = Instant::now();
    create(ns, &names)?;
    ns.kubectl(&[
        "wait",
        "pods",
        "--all",
        "--for=condition=Ready",
        "--timeout=300s",
    ])?;
    let started = begun.elapsed();
    let taken = memory.saturating_sub(available_mib()?);
    // Each is a pod of its own that answers.
    let addresses = ns.field("pods", "{.items[*].status.podIP}")?;
    let distinct: BTreeSet<_> = addresses.split_whitespace().collect();
    ensure!(distinct.len() == PODS, "addresses: {addresses}");
    for name in &names {
        let said = ns.kubectl(&["exec", name, "--", "hostname"])?;
        ensure!(said == *name, "{name} says {said:?}");
    }
    let begun = Instant::now();
    ns.kubectl(&["delete", "pods", "--all", "--timeout=300s"])?;
    println!(
        "  {PODS} pods: ready after {:.1} s, {} MiB of memory each, deleted within {:.1} s",
        started.as_secs_f64(),
        taken / PODS as u64,
        begun.elapsed().as_secs_f64()
    );
    nothing_is_left(ns, &before)
}

/// Memory that the machine can still give.
fn available_mib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kib.context("MemAvailable")?.parse::<u64>()? / 1024)
}

/// A budget lets one pod of two go: the other stays until it does not hold any
/// more.
pub fn a_drain_respects_a_budget(ns: &Namespace<'_>) -> Result<()> {
    let labels = json!({ "app": "guarded" });
    ns.apply(&json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": { "name": "guarded" },
        "spec": {
            "replicas": 2,
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "containers": [busybox("c", IDLE)],
                    "terminationGracePeriodSeconds": 5,
                },
            },
        },
    }))?;
    ns.apply(&json!({
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": { "name": "guarded" },
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": labels } },
    }))?;
    ns.roll_out("deployment/guarded")?;
    ns.wait("pdb/guarded", "jsonpath={.status.disruptionsAllowed}=1")?;
    let before = pods(ns)?;
    // Only these: others of the cluster are to stay.
    let drain = |timeout: &str| {
        let selector = "--pod-selector=app=guarded";
        ns.try_kubectl(&["drain", NODE, selector, timeout], None)
    };
    let refused = drain("--timeout=15s")?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "it was not kept from it: {said}");
    ensure!(said.contains("disruption budget"), "{said}");
    let stays = pods(ns)?.intersection(&before).count();
    ensure!(stays == 1, "{stays} of {before:?} stay");

    ns.kubectl(&["delete", "pdb", "guarded"])?;
    let drained = drain("--timeout=60s")?;
    ensure!(drained.status.success(), "{drained:?}");
    let stays = pods(ns)?.intersection(&before).count();
    ensure!(stays == 0, "{stays} of {before:?} stay");
    // Those in their place had nowhere to go.
    ns.kubectl(&["uncordon", NODE])?;
    ns.roll_out("deployment/guarded")
}

fn pods(ns: &Namespace<'_>) -> Result<BTreeSet<String>> {
    let uids = ns.field("pods", "{.items[*].metadata.uid}")?;
    Ok(uids.split_whitespace().map(str::to_owned).collect())
}
