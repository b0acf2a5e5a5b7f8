//! What pods cost, as the scheduler and the kubelet count it.

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::cgroup;
use e2e::cluster::{HANDLER, NODE, Namespace};
use serde_json::{Value, json};

use crate::{IDLE, busybox, pod};

const MIB: u64 = 1 << 20;

/// A quantity of memory, as the API server prints it.
fn bytes(quantity: &str) -> Result<u64> {
    let units = [("Ki", 1 << 10), ("Mi", MIB), ("Gi", 1 << 30), ("", 1)];
    let parsed = units.into_iter().find_map(|(unit, bytes)| {
        let number = quantity.strip_suffix(unit)?.parse::<u64>().ok()?;
        Some(number * bytes)
    });
    parsed.with_context(|| format!("{quantity:?} is no quantity of memory"))
}

/// What the node can give to pods, less what its pods have requested of it with
/// their overhead.
fn free(ns: &Namespace<'_>) -> Result<u64> {
    let cluster = ns.cluster();
    let all = "jsonpath={.status.allocatable.memory}";
    let all = bytes(&cluster.kubectl(&["get", "node", NODE, "-o", all])?)?;
    let pods = cluster.kubectl(&["get", "pods", "-A", "-o", "json"])?;
    let pods: Value = serde_json::from_str(&pods)?;
    let mut taken = 0;
    for pod in pods["items"].as_array().context("pods")? {
        let phase = pod["status"]["phase"].as_str();
        if matches!(phase, Some("Succeeded" | "Failed")) {
            continue;
        }
        let containers = pod["spec"]["containers"].as_array().context("containers")?;
        let requests = containers
            .iter()
            .map(|container| &container["resources"]["requests"]["memory"]);
        let overhead = std::iter::once(&pod["spec"]["overhead"]["memory"]);
        for quantity in requests.chain(overhead).filter_map(Value::as_str) {
            taken += bytes(quantity)?;
        }
    }
    Ok(all - taken)
}

fn limited(name: &str, class: Option<&str>, mib: u64, script: &str) -> Value {
    let mut container = busybox("c", script);
    let memory = json!({ "memory": format!("{mib}Mi") });
    container["resources"] = json!({ "requests": memory, "limits": memory });
    let mut spec = json!({ "containers": [container], "terminationGracePeriodSeconds": 1 });
    if let Some(class) = class {
        spec["runtimeClassName"] = json!(class);
    }
    pod(name, spec)
}

/// Six pods would fit by their requests alone; with what they cost beyond
/// these, five do.
pub fn as_many_pods_fit_as_requests_and_overhead_allow(ns: &Namespace<'_>) -> Result<()> {
    const FIT: u64 = 5;
    let overhead = ns.cluster().overhead_mib();
    let free = free(ns)? / MIB;
    let request = free / (FIT + 1) - overhead / 2;
    let six = (FIT + 1) * request;
    ensure!(six <= free, "six of {request} MiB are more than {free}");
    let room = FIT * (request + overhead)..(FIT + 1) * (request + overhead);
    ensure!(
        room.contains(&free),
        "{request} and {overhead} MiB do not tell five from six in {free}"
    );
    for number in 0..=FIT {
        let name = format!("large-{number}");
        ns.apply(&limited(&name, Some(HANDLER), request, IDLE))?;
        if number < FIT {
            ns.wait(&format!("pod/{name}"), "condition=Ready")?;
        }
    }
    let last = format!("pod/large-{FIT}");
    let scheduled = "{.status.conditions[?(@.type==\"PodScheduled\")]";
    let waits = format!("jsonpath={scheduled}.reason}}=Unschedulable");
    ns.wait(&last, &waits)?;
    let why = ns.field(&last, &format!("{scheduled}.message}}"))?;
    ensure!(why.contains("Insufficient memory"), "{why}");
    // The room of one is room for the one that waits.
    ns.kubectl(&["delete", "pod", "large-0"])?;
    ns.wait(&last, "condition=Ready")?;
    ns.kubectl(&["delete", "pods", "--all", "--now"])?;
    Ok(())
}

/// The kubelet's group of a pod.
struct Group {
    limit: u64,
    /// How often the limit was hit.
    hits: u64,
    /// The most that it held.
    most: u64,
}

fn group_of(ns: &Namespace<'_>, name: &str) -> Result<Group> {
    let uid = ns.field(&format!("pod/{name}"), "{.metadata.uid}")?;
    let parent = ns.node()?.pods_cgroup();
    let group = format!("{parent}/kubepods/burstable/pod{uid}");
    let dirs = cgroup::groups(group.trim_start_matches('/'))?;
    let figure = |names: [&str; 2]| -> Result<String> {
        let mut files = dirs.iter().flat_map(|dir| names.map(|name| dir.join(name)));
        let file = files.find(|file| file.exists());
        let file = file.with_context(|| format!("none of {names:?} in {group}"))?;
        Ok(fs::read_to_string(&file)?.trim().to_owned())
    };
    let hits = figure(["memory.events", "memory.failcnt"])?;
    let of_two = hits.lines().find_map(|line| line.strip_prefix("max "));
    Ok(Group {
        limit: figure(["memory.max", "memory.limit_in_bytes"])?.parse()?,
        hits: of_two.unwrap_or(&hits).parse()?,
        most: figure(["memory.peak", "memory.max_usage_in_bytes"])?.parse()?,
    })
}

/// A container that takes all it may is ended in its guest, again and again,
/// and what it has on the node stays within the limit that the kubelet set.
pub fn a_pods_group_is_never_exceeded(ns: &Namespace<'_>) -> Result<()> {
    const LIMIT_MIB: u64 = 192;
    ns.apply(&limited(
        "greedy",
        Some(HANDLER),
        LIMIT_MIB,
        "tail /dev/zero",
    ))?;
    let restarts = "{.status.containerStatuses[0].restartCount}";
    ns.wait("pod/greedy", &format!("jsonpath={restarts}=2"))?;
    let ended = "{.status.containerStatuses[0].lastState.terminated.reason}";
    let ended = ns.field("pod/greedy", ended)?;
    ensure!(ended == "OOMKilled", "{ended}");
    let group = group_of(ns, "greedy")?;
    let overhead = ns.cluster().overhead_mib();
    assert_eq!(group.limit, (LIMIT_MIB + overhead) * MIB);
    ensure!(group.hits == 0, "the limit was hit {} times", group.hits);
    // All that the container took is charged there.
    let most = group.most / MIB;
    ensure!(most > LIMIT_MIB - 16, "{most} MiB");
    // One machine through all of it.
    let made = ["pods", "-q", "--name", "greedy"];
    let made = ns.node()?.crictl_ok(&made)?;
    assert_eq!(made.lines().count(), 1, "{made}");
    Ok(())
}

/// Nothing is declared for it, so the kubelet's limit on the pod is that of its
/// container; what the machine itself takes is beside it.
pub fn a_pod_without_a_class_can_use_its_limit(ns: &Namespace<'_>) -> Result<()> {
    const LIMIT_MIB: u64 = 128;
    const USED_MIB: u64 = LIMIT_MIB - 8;
    let script =
        format!("dd if=/dev/zero of=/dev/null bs={USED_MIB}M count=1 && touch /used; {IDLE}");
    let mut plain = limited("plain", None, LIMIT_MIB, &script);
    plain["spec"]["containers"][0]["readinessProbe"] = json!({
        "exec": { "command": ["test", "-e", "/used"] },
        "periodSeconds": 1,
    });
    ns.apply(&plain)?;
    ns.wait("pod/plain", "condition=Ready")?;
    let group = group_of(ns, "plain")?;
    assert_eq!(group.limit, LIMIT_MIB * MIB);
    let most = group.most / MIB;
    ensure!(most > USED_MIB - 16, "{most} MiB");
    ensure!(group.hits == 0, "the limit was hit {} times", group.hits);
    Ok(())
}
