//! The daemon is killed in the middle of things. Whatever was half done is
//! finished or undone by the next one.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::proxy::{Action, Proxy};
use e2e::{Node, Pod, eventually, registry};
use serde_json::json;

use crate::shares_the_hosts_kernel;

/// Moments within a pod's start at which the daemon is killed.
const MOMENTS: u32 = 10;

/// Runs `request` in the background and kills the daemon when `moment` returns.
fn kill_during<T: Send>(
    node: &Node,
    request: impl FnOnce() -> T + Send,
    moment: impl FnOnce() -> Result<()>,
) -> Result<T> {
    thread::scope(|scope| {
        let request = scope.spawn(request);
        let reached = moment();
        node.kill_server()?;
        reached?;
        Ok(request.join().expect("thread"))
    })
}

/// How long the new daemon may take to undo by itself what it found half done.
const UNDONE_WITHIN: Duration = Duration::from_secs(20);

/// Fails unless the pod is listed as ready and works, or is not listed and has
/// left nothing, without anybody asking; and the interrupted request can be
/// made again.
fn assert_whole_or_gone(node: &Node, config: &PodSandboxConfig) -> Result<()> {
    let cri = node.cri()?;
    let pods = eventually("the pod to be whole or gone", UNDONE_WITHIN, || {
        let pods = cri
            .list_pod_sandbox(ListPodSandboxRequest::default())?
            .items;
        let ready = |pod: &PodSandbox| pod.state() == PodSandboxState::SandboxReady;
        ensure!(pods.len() <= 1 && pods.iter().all(ready), "{pods:?}");
        if pods.is_empty() {
            node.assert_no_pod_left()?;
        }
        Ok::<_, anyhow::Error>(pods)
    })?;
    if let Some(found) = pods.first() {
        let pod = Pod::known(node, &found.id, config.clone())?;
        ensure!(
            pod.addresses()?.len() == 2,
            "a ready pod without its addresses"
        );
        pod.start_idle("c")?
            .exec(&["true"])
            .context("exec in the pod that is ready")?;
    }
    node.remove_all_pods()?;
    node.assert_no_pod_left()
        .context("after everything was removed")?;
    // The kubelet's retry.
    let again = node
        .run_pod_with(config.clone())
        .context("the same request again")?;
    again.start_idle("c")?.exec(&["true"])?;
    node.remove_all_pods()
}

#[test]
fn killed_at_any_moment_of_a_pods_start_it_is_whole_or_gone() -> Result<()> {
    let node = Node::start()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    node.pull_busybox()?;
    let begun = Instant::now();
    let pod = node.run_pod("measured")?;
    let whole = begun.elapsed();
    pod.remove()?;
    for n in 0..=MOMENTS {
        let config = node.pod_config(&format!("moment-{n}"));
        fs::create_dir_all(&config.log_directory)?;
        kill_during(
            &node,
            || node.try_run_pod(config.clone()).map(drop),
            || {
                // A moment in time is what this is about; there is no event.
                thread::sleep(whole * n / MOMENTS);
                Ok(())
            },
        )?
        .ok();
        node.start_server()?;
        assert_whole_or_gone(&node, &config)
            .with_context(|| format!("killed {n}/{MOMENTS} through the start"))?;
    }
    node.finish()
}

#[test]
fn killed_while_the_network_is_set_up_it_is_whole_or_gone() -> Result<()> {
    let node = Node::builder()
        .cni(|conf| {
            if let Some(plugins) = conf["plugins"].as_array_mut() {
                plugins.push(json!({ "type": "e2e-waits" }));
            }
        })
        .prepare()?;
    let dir = node.plugin_dir().display().to_string();
    // The real plugin that it wraps makes the result; its ADD waits.
    let script = format!(
        r#"#!/bin/sh
if [ "$CNI_COMMAND" = ADD ]; then
    touch {dir}/reached
    while [ ! -e {dir}/go ]; do sleep 0.05; done
fi
exec /usr/lib/cni/tuning
"#
    );
    node.write_plugin("e2e-waits", &script)?;
    node.start_server()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    node.pull_busybox()?;
    let reached = node.plugin_dir().join("reached");
    let config = node.pod_config("networking");
    fs::create_dir_all(&config.log_directory)?;
    kill_during(
        &node,
        || node.try_run_pod(config.clone()).map(drop),
        || {
            eventually("the plugin to be called", Duration::from_secs(20), || {
                ensure!(reached.exists(), "not yet");
                Ok::<_, anyhow::Error>(())
            })
        },
    )?
    .ok();
    fs::write(node.plugin_dir().join("go"), "")?;
    node.start_server()?;
    assert_whole_or_gone(&node, &config)?;
    node.finish()
}

#[test]
fn killed_while_the_machine_boots_it_is_whole_or_gone() -> Result<()> {
    let node = Node::start()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    node.pull_busybox()?;
    let config = node.pod_config("booting");
    fs::create_dir_all(&config.log_directory)?;
    kill_during(
        &node,
        || node.try_run_pod(config.clone()).map(drop),
        || {
            eventually("the VMM to run", Duration::from_secs(20), || {
                let processes = node.pod_processes()?;
                ensure!(
                    processes.values().any(|line| line.contains("drupe-vmm")),
                    "{processes:?}"
                );
                Ok::<_, anyhow::Error>(())
            })
        },
    )?
    .ok();
    node.start_server()?;
    assert_whole_or_gone(&node, &config)?;
    node.finish()
}

#[test]
fn killed_while_a_container_is_made_or_started_it_can_be_made_again() -> Result<()> {
    let node = Node::start()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    node.pull_busybox()?;
    let pod = node.run_pod("containers")?;
    let begun = Instant::now();
    pod.start_idle("measured")?;
    let whole = begun.elapsed();
    for n in 0..=MOMENTS {
        let name = format!("c{n}");
        kill_during(
            &node,
            || pod.start_idle(&name).map(drop),
            || {
                // A moment in time is what this is about; there is no event.
                thread::sleep(whole * n / MOMENTS);
                Ok(())
            },
        )?
        .ok();
        node.start_server()?;
        let moment = || format!("killed {n}/{MOMENTS} through the start of a container");
        let filter = ContainerFilter {
            label_selector: [("container".to_owned(), name.clone())].into(),
            ..Default::default()
        };
        let cri = node.cri()?;
        let found = cri
            .list_containers(ListContainersRequest {
                filter: Some(filter),
            })?
            .containers;
        for container in found {
            let request = ContainerStatusRequest {
                container_id: container.id.clone(),
                verbose: false,
            };
            cri.container_status(request).with_context(moment)?;
            cri.stop_container(StopContainerRequest {
                container_id: container.id.clone(),
                timeout: 0,
            })
            .with_context(moment)?;
            cri.remove_container(RemoveContainerRequest {
                container_id: container.id,
            })
            .with_context(moment)?;
        }
        let again = pod.start_idle(&name).with_context(moment)?;
        again.exec(&["true"]).with_context(moment)?;
        again.remove()?;
    }
    node.finish()
}

#[test]
fn killed_while_a_pod_is_stopped_or_removed_it_goes_in_the_end() -> Result<()> {
    let node = Node::start()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    node.pull_busybox()?;
    for n in 0..5_u32 {
        let pod = node.run_pod(&format!("leaving-{n}"))?;
        pod.start_idle("c")?;
        kill_during(
            &node,
            || pod.remove(),
            || {
                // A moment in time is what this is about; there is no event.
                thread::sleep(Duration::from_millis(20) * n);
                Ok(())
            },
        )?
        .ok();
        node.start_server()?;
        pod.stop()?;
        pod.remove()?;
        node.assert_no_pod_left()
            .with_context(|| format!("killed {} ms after RemovePodSandbox", 20 * n))?;
    }
    node.finish()
}

#[test]
fn killed_while_an_image_is_pulled_nothing_half_written_is_seen() -> Result<()> {
    let node = Node::start()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    let proxy = Proxy::start(&node.netns, "127.0.0.1:5008", registry::ADDRESS, None)?;
    proxy.add_rule("/blobs/", Action::StallAfter(100_000), 2);
    let name = format!("{}/busybox:latest", proxy.address);
    let cri = node.cri()?;
    kill_during(
        &node,
        || cri.pull(&name),
        || {
            eventually("a blob to be asked for", Duration::from_secs(20), || {
                ensure!(
                    proxy
                        .requests()
                        .iter()
                        .any(|request| request.path.contains("/blobs/")),
                    "not yet"
                );
                Ok::<_, anyhow::Error>(())
            })
        },
    )?
    .err()
    .context("the pull ended before the daemon did")?;
    node.start_server()?;
    let cri = node.cri()?;
    ensure!(
        cri.find_image(&name)?.is_none(),
        "an image that was never whole"
    );
    cri.pull(&name)?;
    let pod = node.run_pod("pulled")?;
    let mut config = pod.container_config("c", e2e::pod::IDLE);
    config.image.get_or_insert_default().image = name;
    pod.start_with(config)?.exec(&["true"])?;
    node.finish()
}
