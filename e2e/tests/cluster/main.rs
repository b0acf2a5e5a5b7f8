//! What users of a cluster do, on a real control plane and kubelet with drupe
//! as the node's only runtime.
//!
//! One cluster for all scenarios, each in a namespace of its own. Arguments
//! choose scenarios by parts of their names, as with other tests.

mod lifecycle;
mod restarts;
mod streams;
mod volumes;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use e2e::Server;
use e2e::cluster::{Cluster, Namespace};
use serde_json::{Value, json};

type Scenario = fn(&Namespace<'_>) -> Result<()>;

const SCENARIOS: &[(&str, Scenario)] = &[
    (
        "a-deployment-rolls-out-and-is-updated",
        lifecycle::a_deployment_rolls_out_and_is_updated,
    ),
    (
        "init-and-sidecar-containers-come-first",
        lifecycle::init_and_sidecar_containers_come_first,
    ),
    (
        "probes-restart-and-admit",
        lifecycle::probes_restart_and_admit,
    ),
    (
        "a-job-runs-to-completion",
        lifecycle::a_job_runs_to_completion,
    ),
    (
        "a-pod-beyond-its-memory-is-oom-killed",
        lifecycle::a_pod_beyond_its_memory_is_oom_killed,
    ),
    ("a-pod-ends-in-grace", lifecycle::a_pod_ends_in_grace),
    (
        "a-pod-on-the-nodes-network-runs-on-its-kernel",
        lifecycle::a_pod_on_the_nodes_network_runs_on_its_kernel,
    ),
    (
        "a-pod-is-resized-in-place",
        lifecycle::a_pod_is_resized_in_place,
    ),
    (
        "config-and-secrets-change-while-mounted",
        volumes::config_and_secrets_change_while_mounted,
    ),
    ("a-pod-knows-itself", volumes::a_pod_knows_itself),
    ("directories-are-shared", volumes::directories_are_shared),
    ("logs-are-followed", streams::logs_are_followed),
    (
        "commands-run-with-their-streams",
        streams::commands_run_with_their_streams,
    ),
    (
        "files-are-copied-both-ways",
        streams::files_are_copied_both_ways,
    ),
    ("ports-are-forwarded", streams::ports_are_forwarded),
    ("a-debug-container-joins", streams::a_debug_container_joins),
];

fn main() -> Result<ExitCode> {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let is_wanted = |name: &str| {
        let contains = |part: &String| name.contains(&part.replace('_', "-"));
        wanted.is_empty() || wanted.iter().any(contains)
    };
    let begun = Instant::now();
    let mut cluster = Cluster::start(Server::Drupe)?;
    println!(
        "the cluster is up after {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    let mut failed = Vec::new();
    let mut run = 0;
    let mut report = |name: &'static str, work: &mut dyn FnMut() -> Result<()>| {
        let begun = Instant::now();
        run += 1;
        let outcome = work();
        let took = begun.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => println!("test {name} ... ok ({took:.1} s)"),
            Err(error) => {
                println!("test {name} ... FAILED ({took:.1} s)\n{error:?}\n");
                failed.push(name);
            }
        }
    };
    for (name, scenario) in SCENARIOS {
        if is_wanted(name) {
            report(name, &mut || scenario(&cluster.namespace(name)?));
        }
    }
    for (name, scenario) in restarts::SCENARIOS {
        if is_wanted(name) {
            report(name, &mut || scenario(&mut cluster, name));
        }
    }
    let logs = cluster.logs();
    if !failed.is_empty() {
        println!(
            "failed: {}; logs are in {}",
            failed.join(", "),
            logs.display()
        );
        drop(cluster);
        return Ok(ExitCode::FAILURE);
    }
    ensure!(run > 0, "no scenario is called {}", wanted.join(" or "));
    cluster.finish()?;
    println!(
        "{run} scenarios passed in {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}

/// A container of the busybox image that runs `script`.
fn busybox(name: &str, script: &str) -> Value {
    json!({
        "name": name,
        "image": e2e::node::BUSYBOX,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", script],
    })
}

/// Runs until it is asked to end.
const IDLE: &str = "trap 'exit 0' TERM; while :; do sleep 1; done";

fn pod(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "labels": { "app": name } },
        "spec": spec,
    })
}
