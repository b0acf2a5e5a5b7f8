//! Pods that come, are updated, fail, are restarted and end.

use anyhow::{Context, Result, ensure};
use e2e::cluster::{HANDLER, Namespace};
use serde_json::{Value, json};

use crate::{IDLE, busybox, pod};

/// Serves a page with `text`.
fn web(text: &str) -> String {
    format!("mkdir -p /www && echo {text} > /www/index.html && exec httpd -f -p 8080 -h /www")
}

pub fn a_deployment_rolls_out_and_is_updated(ns: &Namespace<'_>) -> Result<()> {
    let deployment = |text: &str| {
        let mut server = busybox("web", &web(text));
        server["readinessProbe"] = json!({ "httpGet": { "port": 8080 }, "periodSeconds": 1 });
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": { "name": "web" },
            "spec": {
                "replicas": 3,
                "selector": { "matchLabels": { "app": "web" } },
                "template": {
                    "metadata": { "labels": { "app": "web" } },
                    "spec": { "containers": [server], "terminationGracePeriodSeconds": 1 },
                },
            },
        })
    };
    ns.apply(&pod(
        "client",
        json!({ "containers": [busybox("client", IDLE)], "terminationGracePeriodSeconds": 1 }),
    ))?;
    ns.wait("pod/client", "condition=Ready")?;
    let roll_out = |text: &str| -> Result<()> {
        ns.apply(&deployment(text))?;
        ns.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"])?;
        for address in addresses(ns)? {
            let url = format!("http://{address}:8080/");
            let page = ns.kubectl(&["exec", "client", "--", "wget", "-q", "-O-", &url])?;
            ensure!(page == text, "{address} serves {page:?}");
        }
        Ok(())
    };
    roll_out("one")?;
    roll_out("two")?;
    let replicas = ns.field(
        "deployment/web",
        "{.status.readyReplicas} {.status.updatedReplicas}",
    )?;
    ensure!(replicas == "3 3", "ready and updated: {replicas}");
    ns.kubectl(&[
        "delete",
        "deployment/web",
        "--cascade=foreground",
        "--timeout=60s",
    ])?;
    Ok(())
}

/// Of the deployment's pods that are to stay.
fn addresses(ns: &Namespace<'_>) -> Result<Vec<String>> {
    let pods = ns.kubectl(&["get", "pods", "-l", "app=web", "-o", "json"])?;
    let pods: Value = serde_json::from_str(&pods)?;
    let stays = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
    let pods: Vec<&Value> = pods["items"]
        .as_array()
        .context("items")?
        .iter()
        .filter(stays)
        .collect();
    ensure!(pods.len() == 3, "{} pods", pods.len());
    let address = |pod: &&Value| Some(pod["status"]["podIP"].as_str()?.to_owned());
    Ok(pods.iter().filter_map(address).collect())
}

pub fn init_and_sidecar_containers_come_first(ns: &Namespace<'_>) -> Result<()> {
    let mount = json!([{ "name": "shared", "mountPath": "/shared" }]);
    let mut init = busybox("init", "echo init >> /shared/order");
    let mut sidecar = busybox("sidecar", &format!("echo sidecar >> /shared/order; {IDLE}"));
    sidecar["restartPolicy"] = json!("Always");
    sidecar["startupProbe"] =
        json!({ "exec": { "command": ["grep", "sidecar", "/shared/order"] }, "periodSeconds": 1 });
    let mut main = busybox("main", "echo main >> /shared/order; cat /shared/order");
    for container in [&mut init, &mut sidecar, &mut main] {
        container["volumeMounts"] = mount.clone();
    }
    ns.apply(&pod(
        "ordered",
        json!({
            "restartPolicy": "Never",
            "initContainers": [init, sidecar],
            "containers": [main],
            "volumes": [{ "name": "shared", "emptyDir": {} }],
        }),
    ))?;
    ns.wait("pod/ordered", "jsonpath={.status.phase}=Succeeded")?;
    let log = ns.kubectl(&["logs", "ordered", "-c", "main"])?;
    ensure!(log == "init\nsidecar\nmain", "{log:?}");
    Ok(())
}

pub fn probes_restart_and_admit(ns: &Namespace<'_>) -> Result<()> {
    let mut sick = busybox("sick", &format!("touch /healthy; {IDLE}"));
    sick["livenessProbe"] = json!({
        "exec": { "command": ["test", "-e", "/healthy"] },
        "periodSeconds": 1, "failureThreshold": 1,
    });
    let mut by_tcp = busybox("by-tcp", &web("here"));
    by_tcp["readinessProbe"] = json!({ "tcpSocket": { "port": 8080 }, "periodSeconds": 1 });
    let spec = |container| json!({ "containers": [container], "terminationGracePeriodSeconds": 1 });
    ns.apply(&pod("sick", spec(sick)))?;
    ns.apply(&pod("by-tcp", spec(by_tcp)))?;
    ns.apply(&pod("fails", spec(busybox("fails", "exit 3"))))?;
    ns.wait("pod/by-tcp", "condition=Ready")?;
    ns.wait("pod/sick", "condition=Ready")?;
    ns.kubectl(&["exec", "sick", "--", "rm", "/healthy"])?;
    ns.wait(
        "pod/sick",
        "jsonpath={.status.containerStatuses[0].restartCount}=1",
    )?;
    ns.wait(
        "pod/fails",
        "jsonpath={.status.containerStatuses[0].state.waiting.reason}=CrashLoopBackOff",
    )?;
    let code = ns.field(
        "pod/fails",
        "{.status.containerStatuses[0].lastState.terminated.exitCode}",
    )?;
    ensure!(code == "3", "{code}");
    Ok(())
}

pub fn a_job_runs_to_completion(ns: &Namespace<'_>) -> Result<()> {
    ns.apply(&json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": { "name": "work" },
        "spec": {
            "completions": 3,
            "parallelism": 2,
            "template": { "spec": {
                "restartPolicy": "Never",
                "containers": [busybox("work", "echo done by $(hostname)")],
            }},
        },
    }))?;
    ns.wait("job/work", "condition=Complete")?;
    let succeeded = ns.field("job/work", "{.status.succeeded}")?;
    ensure!(succeeded == "3", "{succeeded}");
    Ok(())
}

pub fn a_pod_beyond_its_memory_is_oom_killed(ns: &Namespace<'_>) -> Result<()> {
    let mut greedy = busybox("greedy", "head -c 200m /dev/zero | tail");
    greedy["resources"] = json!({ "limits": { "memory": "64Mi" } });
    ns.apply(&pod(
        "greedy",
        json!({ "runtimeClassName": HANDLER, "restartPolicy": "Never", "containers": [greedy] }),
    ))?;
    ns.wait("pod/greedy", "jsonpath={.status.phase}=Failed")?;
    let reason = ns.field(
        "pod/greedy",
        "{.status.containerStatuses[0].state.terminated['reason','exitCode']}",
    )?;
    ensure!(reason == "OOMKilled 137", "{reason}");
    Ok(())
}

pub fn a_pod_ends_in_grace(ns: &Namespace<'_>) -> Result<()> {
    // What it says at its end is read from the log that follows it.
    let mut container = busybox(
        "c",
        "trap 'echo asked to end; exit 0' TERM; echo up; while :; do sleep 1; done",
    );
    container["lifecycle"] =
        json!({ "preStop": { "exec": { "command": ["sh", "-c", "echo before > /proc/1/fd/1"] } } });
    ns.apply(&pod(
        "graceful",
        json!({ "containers": [container], "terminationGracePeriodSeconds": 20 }),
    ))?;
    ns.wait("pod/graceful", "condition=Ready")?;
    let follower = ns.spawn_kubectl(&["logs", "-f", "graceful"])?;
    let begun = std::time::Instant::now();
    ns.kubectl(&["delete", "pod/graceful", "--timeout=60s"])?;
    ensure!(
        begun.elapsed().as_secs() < 15,
        "killed, not asked: {:?}",
        begun.elapsed()
    );
    let output = follower.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(said == "up\nbefore\nasked to end\n", "{said:?}");
    Ok(())
}

pub fn a_pod_on_the_nodes_network_runs_on_its_kernel(ns: &Namespace<'_>) -> Result<()> {
    ns.apply(&pod(
        "agent",
        json!({ "hostNetwork": true, "containers": [busybox("c", IDLE)], "terminationGracePeriodSeconds": 1 }),
    ))?;
    ns.apply(&pod(
        "guest",
        json!({ "containers": [busybox("c", IDLE)], "terminationGracePeriodSeconds": 1 }),
    ))?;
    for name in ["agent", "guest"] {
        ns.wait(&format!("pod/{name}"), "condition=Ready")?;
    }
    let kernel = |name| ns.kubectl(&["exec", name, "--", "uname", "-r"]);
    let host = nix::sys::utsname::uname()?;
    let host = host.release().to_string_lossy().into_owned();
    ensure!(kernel("agent")? == host, "not the node's kernel");
    ensure!(kernel("guest")? != host, "the node's kernel");
    let links = ns.kubectl(&["exec", "agent", "--", "ls", "/sys/class/net"])?;
    ensure!(links.contains("node0"), "not the node's network: {links}");
    Ok(())
}

pub fn a_pod_is_resized_in_place(ns: &Namespace<'_>) -> Result<()> {
    let mut container = busybox("c", IDLE);
    container["resources"] = json!({
        "requests": { "cpu": "100m", "memory": "64Mi" },
        "limits": { "cpu": "500m", "memory": "128Mi" },
    });
    ns.apply(&pod(
        "elastic",
        json!({
            "runtimeClassName": HANDLER,
            "containers": [container],
            "terminationGracePeriodSeconds": 1,
        }),
    ))?;
    ns.wait("pod/elastic", "condition=Ready")?;
    let limit = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    let seen = || ns.kubectl(&["exec", "elastic", "--", "sh", "-c", limit]);
    ensure!(seen()? == "134217728\n50000 100000", "{}", seen()?);
    for (memory, cpu, expected) in [
        ("256Mi", "800m", "268435456\n80000 100000"),
        ("96Mi", "300m", "100663296\n30000 100000"),
    ] {
        let patch = json!({ "spec": { "containers": [{ "name": "c", "resources": {
            "limits": { "cpu": cpu, "memory": memory },
        }}]}});
        ns.kubectl(&[
            "patch",
            "pod",
            "elastic",
            "--subresource",
            "resize",
            "--patch",
            &patch.to_string(),
        ])?;
        ns.wait(
            "pod/elastic",
            &format!("jsonpath={{.status.containerStatuses[0].resources.limits.memory}}={memory}"),
        )?;
        ensure!(seen()? == expected, "{} instead of {expected}", seen()?);
    }
    let restarts = ns.field("pod/elastic", "{.status.containerStatuses[0].restartCount}")?;
    ensure!(restarts == "0", "restarted {restarts} times");
    Ok(())
}
