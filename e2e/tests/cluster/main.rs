//! What users of a cluster do, on a real control plane and kubelet with drupe
//! as the node's only runtime.
//!
//! One cluster for all scenarios, each in a namespace of its own. Arguments
//! choose scenarios by parts of their names, as with other tests.

mod churn;
mod lifecycle;
mod restarts;
mod scheduling;
mod services;
mod storage;
mod streams;
mod volumes;
mod workloads;

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
    (
        "services-are-reached-by-name-and-address",
        services::services_are_reached_by_name_and_address,
    ),
    (
        "a-pod-asks-the-api-server-as-itself",
        services::a_pod_asks_the_api_server_as_itself,
    ),
    (
        "an-update-fails-no-request",
        services::an_update_fails_no_request,
    ),
    (
        "a-daemonset-serves-on-the-nodes-network",
        services::a_daemonset_serves_on_the_nodes_network,
    ),
    (
        "a-grpc-probe-sees-a-server-hang",
        workloads::a_grpc_probe_sees_a_server_hang,
    ),
    (
        "a-cron-job-runs-by-its-schedule-and-by-hand",
        workloads::a_cron_job_runs_by_its_schedule_and_by_hand,
    ),
    ("default-limits-hold", workloads::default_limits_hold),
    (
        "directories-of-the-node-are-shared",
        storage::directories_of_the_node_are_shared,
    ),
    (
        "parts-of-volumes-are-mounted",
        storage::parts_of_volumes_are_mounted,
    ),
    (
        "files-of-a-claim-outlive-pods",
        storage::files_of_a_claim_outlive_pods,
    ),
    (
        "a-disk-of-a-claim-outlives-pods",
        storage::a_disk_of_a_claim_outlives_pods,
    ),
    (
        "a-container-is-attached-to",
        streams::a_container_is_attached_to,
    ),
    (
        "pods-are-deleted-while-they-start",
        churn::pods_are_deleted_while_they_start,
    ),
    (
        "a-drain-respects-a-budget",
        churn::a_drain_respects_a_budget,
    ),
    (
        "as-many-pods-fit-as-requests-and-overhead-allow",
        scheduling::as_many_pods_fit_as_requests_and_overhead_allow,
    ),
    (
        "a-pods-group-is-never-exceeded",
        scheduling::a_pods_group_is_never_exceeded,
    ),
    (
        "a-pod-without-a-class-can-use-its-limit",
        scheduling::a_pod_without_a_class_can_use_its_limit,
    ),
    ("forty-pods-run-at-once", churn::forty_pods_run_at_once),
];

fn main() -> Result<ExitCode> {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let contains = |name: &str, part: &str| name.contains(&part.replace('_', "-"));
    let is_wanted =
        |name: &str| wanted.is_empty() || wanted.iter().any(|part| contains(name, part));
    let of_restarts = restarts::SCENARIOS.iter().map(|(name, _)| *name);
    let names: Vec<_> = (SCENARIOS.iter().map(|(name, _)| *name))
        .chain(of_restarts)
        .collect();
    for part in &wanted {
        ensure!(
            names.iter().any(|name| contains(name, part)),
            "no scenario is called {part}; there are\n  {}",
            names.join("\n  ")
        );
    }
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
            report(name, &mut || {
                let ns = cluster.namespace(name)?;
                let outcome = scenario(&ns);
                // The next one is alone, whatever became of this one.
                let deleted = ns.delete();
                outcome.and(deleted)
            });
        }
    }
    for (name, scenario) in restarts::SCENARIOS {
        if is_wanted(name) {
            report(name, &mut || {
                let outcome = scenario(&mut cluster, name);
                let deleted = cluster.existing_namespace(name).delete();
                outcome.and(deleted)
            });
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

/// A pod that does nothing and ends when it is asked to.
fn idle_pod(name: &str) -> Value {
    let spec = json!({ "containers": [busybox("c", IDLE)], "terminationGracePeriodSeconds": 1 });
    pod(name, spec)
}

fn pod(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "labels": { "app": name } },
        "spec": spec,
    })
}
