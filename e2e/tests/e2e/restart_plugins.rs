//! The daemon is started again on a node whose CNI plugins misbehave.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::{Node, eventually};

use crate::shares_the_hosts_kernel;

/// Far below the 30 s that a plugin may take.
const SERVES_WITHIN: Duration = Duration::from_secs(10);
const SOON: Duration = Duration::from_secs(30);
const HALF_MADE: usize = 3;

/// A node with one more plugin in its chain, which does `script` before it does
/// what it should.
fn node_with_plugin(script: &str) -> Result<Node> {
    let node = Node::builder().plugin("e2e-odd").prepare()?;
    let dir = node.plugin_dir().display().to_string();
    let script = format!("#!/bin/sh\ncd {dir}\n{script}\nexec /usr/lib/cni/tuning\n");
    node.write_plugin("e2e-odd", &script)?;
    Ok(node)
}

/// Holds up a verb while there is a file of its name, for pods called `held-*`.
const HOLDS: &str = r#"case "$CNI_ARGS" in *K8S_POD_NAME=held-*)
    if [ -e "hold-$CNI_COMMAND" ]; then
        touch "$CNI_COMMAND-$CNI_CONTAINERID"
        while [ -e "hold-$CNI_COMMAND" ]; do sleep 0.05; done
    fi ;;
esac"#;

/// How many pods the plugin holds up, or has held up, in `verb`.
fn held(node: &Node, verb: &str) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(node.plugin_dir())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        count += usize::from(name.starts_with(&format!("{verb}-")));
    }
    Ok(count)
}

fn await_held(node: &Node, verb: &str, count: usize) -> Result<()> {
    eventually(&format!("{count} {verb} to be held up"), SOON, || {
        let now = held(node, verb)?;
        ensure!(now >= count, "{now} are");
        Ok::<_, anyhow::Error>(())
    })
}

#[test]
fn a_plugin_that_hangs_holds_up_only_the_pods_it_hangs_for() -> Result<()> {
    let node = node_with_plugin(HOLDS)?;
    node.start_server()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    node.pull_busybox()?;
    let hold_add = node.plugin_dir().join("hold-ADD");
    let hold_del = node.plugin_dir().join("hold-DEL");
    let survivor = node.run_pod("survivor")?;
    let container = survivor.start_idle("c")?;
    let leaving = node.run_pod("held-leaving")?;
    fs::write(&hold_add, "")?;
    fs::write(&hold_del, "")?;
    let mut configs = Vec::new();
    for n in 0..HALF_MADE {
        let config = node.pod_config(&format!("held-{n}"));
        fs::create_dir_all(&config.log_directory)?;
        configs.push(config);
    }
    thread::scope(|scope| {
        for config in &configs {
            scope.spawn(|| node.try_run_pod(config.clone()).map(drop));
        }
        scope.spawn(|| leaving.stop());
        let reached = await_held(&node, "ADD", HALF_MADE).and(await_held(&node, "DEL", 1));
        node.kill_server()?;
        reached
    })?;
    fs::remove_file(&hold_add)?;

    let begun = Instant::now();
    node.start_server()?;
    let took = begun.elapsed();
    ensure!(took < SERVES_WITHIN, "it serves after {took:?}");
    // Of those half made; the one that was being stopped still has its first.
    await_held(&node, "DEL", 1 + HALF_MADE)?;
    let pods = node
        .cri()?
        .list_pod_sandbox(ListPodSandboxRequest::default())?
        .items;
    let of = |state| -> Vec<&str> {
        let pods = pods.iter().filter(|pod| pod.state() == state);
        pods.map(|pod| pod.id.as_str()).collect()
    };
    assert_eq!(of(PodSandboxState::SandboxReady), [survivor.id.as_str()]);
    assert_eq!(of(PodSandboxState::SandboxNotready), [leaving.id.as_str()]);
    assert_eq!(container.exec(&["echo", "here"])?, "here");
    let newcomer = node.run_pod("newcomer")?;
    newcomer.start_idle("c")?.exec(&["true"])?;
    newcomer.stop()?;

    // The kubelet's retry waits for the name and gets it.
    let retried = thread::scope(|scope| -> Result<_> {
        let retry = scope.spawn(|| node.try_run_pod(configs[0].clone()));
        survivor.start_idle("meanwhile")?.exec(&["true"])?;
        ensure!(!retry.is_finished(), "its name is not free yet");
        fs::remove_file(&hold_del)?;
        retry.join().expect("thread").context("the retry")
    })?;
    retried.start_idle("c")?.exec(&["true"])?;
    node.remove_all_pods()?;
    eventually("what was half made to be gone", SOON, || {
        node.assert_no_pod_left()
    })?;
    node.finish()
}

/// What the daemon says of a pod whose network is not in order.
const CHANGED: &str = "the pod's network is not as CNI plugins made it";

#[test]
fn a_network_that_was_changed_is_told_once_and_a_sound_one_never() -> Result<()> {
    let node = node_with_plugin(
        r#"if [ "$CNI_COMMAND" = CHECK ]; then
    echo "$CNI_CONTAINERID" >> checked
    if [ -e changed ]; then
        echo '{"cniVersion":"1.0.0","code":100,"msg":"the route to the moon is gone"}'
        exit 1
    fi
fi"#,
    )?;
    node.start_server()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    node.pull_busybox()?;
    let pod = node.run_pod("checked")?;
    let container = pod.start_idle("c")?;
    let checked = node.plugin_dir().join("checked");
    ensure!(
        !checked.exists(),
        "checked before anything could have changed"
    );

    for restart in 1..=2 {
        node.stop_server()?;
        node.start_server()?;
        eventually("the pod's network to be checked", SOON, || {
            let ended = node.log()?.matches("CNI CHECK ended").count();
            ensure!(ended == restart, "{ended} checks");
            Ok::<_, anyhow::Error>(())
        })?;
    }
    assert_eq!(fs::read_to_string(&checked)?.lines().count(), 2);
    node.stop_server()?;
    ensure!(
        !node.log()?.contains(CHANGED),
        "told of a network that is in order:\n{}",
        node.log_tail()
    );
    fs::write(node.plugin_dir().join("changed"), "")?;
    node.start_server()?;
    eventually("the daemon to tell", SOON, || {
        let log = node.log()?;
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(CHANGED)).collect();
        ensure!(lines.len() == 1, "{lines:?}");
        for part in ["WARN", &pod.id, "the route to the moon is gone", "e2e-odd"] {
            ensure!(lines[0].contains(part), "{part:?} is not in {}", lines[0]);
        }
        Ok::<_, anyhow::Error>(())
    })?;
    // It is a remark, no more.
    assert_eq!(pod.status()?.state(), PodSandboxState::SandboxReady);
    container.exec(&["true"])?;
    node.finish()
}
