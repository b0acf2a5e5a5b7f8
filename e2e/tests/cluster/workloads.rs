//! What is asked of pods beside running: probes by gRPC, schedules, limits.

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::cgroup;
use e2e::cluster::{HANDLER, Namespace, images};
use serde_json::json;

use crate::{IDLE, busybox, pod};

pub fn a_grpc_probe_sees_a_server_hang(ns: &Namespace<'_>) -> Result<()> {
    let image = images::with_program(ns.node()?, "etcd")?;
    let mut etcd = busybox(
        "etcd",
        "etcd --data-dir /tmp/etcd --listen-client-urls http://0.0.0.0:2379 \
         --advertise-client-urls http://127.0.0.1:2379 & trap 'exit 0' TERM; wait",
    );
    etcd["image"] = json!(image);
    etcd["readinessProbe"] = json!({
        "grpc": { "port": 2379 },
        "periodSeconds": 1, "failureThreshold": 1,
    });
    ns.apply(&pod(
        "etcd",
        json!({ "containers": [etcd], "terminationGracePeriodSeconds": 1 }),
    ))?;
    for (signal, condition) in [
        (None, "condition=Ready"),
        (Some("-STOP"), "condition=Ready=False"),
        (Some("-CONT"), "condition=Ready"),
    ] {
        if let Some(signal) = signal {
            ns.kubectl(&["exec", "etcd", "--", "killall", signal, "etcd"])?;
        }
        ns.wait("pod/etcd", condition)?;
    }
    Ok(())
}

/// The next full minute is waited for.
pub fn a_cron_job_runs_by_its_schedule_and_by_hand(ns: &Namespace<'_>) -> Result<()> {
    ns.apply(&json!({
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": { "name": "report" },
        "spec": {
            "schedule": "* * * * *",
            "jobTemplate": { "spec": { "template": { "spec": {
                "restartPolicy": "OnFailure",
                "containers": [busybox("report", "echo reported")],
            }}}},
        },
    }))?;
    ns.kubectl(&["create", "job", "--from=cronjob/report", "now"])?;
    has_reported(ns, "job.batch/now")?;
    ns.wait("cronjob/report", "jsonpath={.status.lastScheduleTime}")?;
    let jobs = ns.kubectl(&["get", "jobs", "-o", "name"])?;
    let scheduled = jobs.lines().find(|job| *job != "job.batch/now");
    has_reported(ns, scheduled.with_context(|| format!("jobs are {jobs:?}"))?)
}

fn has_reported(ns: &Namespace<'_>, job: &str) -> Result<()> {
    ns.wait(job, "condition=Complete")?;
    let log = ns.kubectl(&["logs", job])?;
    ensure!(log == "reported", "{log:?} of {job}");
    Ok(())
}

/// What a namespace gives pods that name no limit is that of the container in
/// the guest, and of the pod on the node.
pub fn default_limits_hold(ns: &Namespace<'_>) -> Result<()> {
    const LIMIT_MIB: u64 = 96;
    ns.apply(&json!({
        "apiVersion": "v1",
        "kind": "LimitRange",
        "metadata": { "name": "usual" },
        "spec": { "limits": [{
            "type": "Container",
            "default": { "memory": format!("{LIMIT_MIB}Mi"), "cpu": "300m" },
            "defaultRequest": { "memory": "32Mi", "cpu": "100m" },
        }]},
    }))?;
    ns.apply(&pod(
        "modest",
        json!({
            "runtimeClassName": HANDLER,
            "containers": [busybox("c", IDLE)],
            "terminationGracePeriodSeconds": 1,
        }),
    ))?;
    ns.wait("pod/modest", "condition=Ready")?;
    let inside = ns.kubectl(&[
        "exec",
        "modest",
        "--",
        "cat",
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/cpu.max",
    ])?;
    let expected = format!("{}\n30000 100000", LIMIT_MIB << 20);
    ensure!(inside == expected, "{inside:?} in the guest");

    let uid = ns.field("pod/modest", "{.metadata.uid}")?;
    let parent = ns.node()?.pods_cgroup();
    let group = format!("{parent}/kubepods/burstable/pod{uid}");
    let mut seen = Vec::new();
    for path in cgroup::groups(group.trim_start_matches('/'))? {
        for file in ["memory.max", "memory.limit_in_bytes"] {
            let file = path.join(file);
            if file.exists() {
                seen.push(fs::read_to_string(&file).context(file.display().to_string())?);
            }
        }
    }
    let limit = format!("{}\n", (LIMIT_MIB + ns.cluster().overhead_mib()) << 20);
    ensure!(seen == [limit], "{seen:?} on the node, in {group}");
    Ok(())
}
