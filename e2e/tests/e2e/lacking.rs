//! Nodes that lack a part of pods' confinement, and operators who want all of it.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use cri_api::v1::{ContainerState, PodSandboxState};
use e2e::cgroup::lock_parent_of_daemon;
use e2e::{Node, Pod, Server};
use rustix::process::Pid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
use serde_json::json;
use tonic::Code;

use crate::command_line::drupe_command;
use crate::{pod_refused, refused};

/// A pod in a control group that has all controllers: on cgroup v2 the groups of
/// tests' own have none.
fn run_limited(node: &Node, name: &str) -> Result<Pod> {
    let mut config = node.pod_config(name);
    config.linux.get_or_insert_default().cgroup_parent.clear();
    node.run_pod_with(config)
}

/// The line of `drupe check` about `name`.
fn line_of(node: &Node, name: &str) -> Result<String> {
    let output = drupe_command(node, &["check"])?.output()?;
    let said = String::from_utf8(output.stdout)?;
    let line = said
        .lines()
        .find(|line| line[4.min(line.len())..].trim_start().starts_with(name));
    Ok(line.with_context(|| said.clone())?.to_owned())
}

#[test]
fn where_all_confinement_is_required_pods_run_if_the_node_has_it_and_are_refused_if_not()
-> Result<()> {
    let node = Node::builder()
        .server(Server::Drupe)
        .config(|config| config["confinement"] = json!("required"))
        .start()?;
    for part in ["seccomp filters", "control groups"] {
        let line = line_of(&node, part)?;
        ensure!(line.starts_with("ok"), "{line}");
    }
    let landlock = line_of(&node, "Landlock")?;
    if !landlock.starts_with("ok") {
        // Linux before 6.12.
        ensure!(landlock.starts_with("BAD"), "{landlock}");
        let words = ["Landlock", "`confinement: required`", "Linux 6.12"];
        pod_refused(&node, "partly", Code::FailedPrecondition, &words)?;
        let pull = node.cri()?.pull(e2e::node::BUSYBOX);
        refused(pull, Code::FailedPrecondition, &["a part of Landlock"])?;
        return node.finish();
    }
    // Its unpackers want all of their jail as well.
    node.pull_busybox()?;
    let other_tests_look_later = lock_parent_of_daemon();
    let pod = run_limited(&node, "whole")?;
    let container = pod.start_idle("one")?;

    node.stop_server()?;
    node.let_have_filters(false);
    node.start_server()?;
    let words = [
        "no seccomp filters",
        "`confinement: required`",
        "CONFIG_SECCOMP_FILTER",
    ];
    pod_refused(&node, "lacking", Code::FailedPrecondition, &words)?;
    ensure!(
        node.log()?
            .contains("the node's kernel has no seccomp filters"),
        "no word of it when the daemon started"
    );
    // What runs is not touched.
    assert_eq!(pod.status()?.state(), PodSandboxState::SandboxReady);
    assert_eq!(
        container.status()?.state(),
        ContainerState::ContainerRunning
    );

    // The same kernel, and an operator who takes what there is.
    node.stop_server()?;
    node.edit_config(|config| config["confinement"] = json!("best_effort"))?;
    node.start_server()?;
    let before = times_told(&node)?;
    for name in ["first", "second"] {
        node.run_pod(name)?.remove()?;
    }
    assert_eq!(times_told(&node)?, before, "not for every pod");
    pod.remove()?;
    // The node does, now.
    drop(other_tests_look_later);
    node.finish()
}

fn times_told(node: &Node) -> Result<usize> {
    Ok(node.log()?.matches("no seccomp filters").count())
}

/// The core scheduling cookie of a process; an error where there are none.
fn cookie(pid: u32) -> rustix::io::Result<u64> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    core_scheduling_cookie(
        pid.ok_or(rustix::io::Errno::SRCH)?,
        CoreSchedulingScope::Thread,
    )
}

/// Those of the pod's processes on the node; some end meanwhile.
fn cookies_of_pods(node: &Node) -> Result<BTreeSet<u64>> {
    // A thread of the node's kernel that works for KVM is none, and runs no program.
    let runs = |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok();
    let pids = node.pod_processes()?.into_keys().filter(runs);
    Ok(pids.filter_map(|pid| cookie(pid).ok()).collect())
}

#[test]
fn pods_that_are_to_have_cores_for_themselves_have_a_cookie_each() -> Result<()> {
    let node = Node::builder()
        .server(Server::Drupe)
        .config(|config| config["runtimes"]["microvm"]["core_scheduling"] = json!(true))
        .start()?;
    let line = line_of(&node, "core scheduling")?;
    let has_none = line.contains("no core scheduling");
    ensure!(
        line.starts_with(if has_none { "note" } else { "ok" }),
        "{line}"
    );
    node.pull_busybox()?;
    let mut cookies = BTreeSet::new();
    if let Ok(ours) = cookie(std::process::id()) {
        cookies.insert(ours);
    }
    for number in 1..=2 {
        let pod = node.run_pod(&format!("apart-{number}"))?;
        pod.start_idle("one")?;
        if !cookies.is_empty() {
            let of_pod = cookies_of_pods(&node)?;
            ensure!(of_pod.len() == 1, "{of_pod:?}");
            ensure!(cookies.is_disjoint(&of_pod), "{cookies:?} {of_pod:?}");
            cookies.extend(of_pod);
        }
        pod.remove()?;
    }

    node.stop_server()?;
    node.edit_config(|config| config["confinement"] = json!("required"))?;
    node.start_server()?;
    if has_none {
        let words = ["no core scheduling", "CONFIG_SCHED_CORE"];
        pod_refused(&node, "shared", Code::FailedPrecondition, &words)?;
    } else if line_of(&node, "Landlock")?.starts_with("ok") {
        let _other_tests_look_later = lock_parent_of_daemon();
        run_limited(&node, "alone")?.remove()?;
    }
    node.finish()
}
