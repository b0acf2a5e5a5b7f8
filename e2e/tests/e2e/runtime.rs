//! What the runtime tells of itself and of its node, and how it takes being
//! asked for what it does not have.

use std::collections::HashMap;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::{Node, Server, artifacts};
use serde_json::json;
use tonic::Code;

use crate::{drupe, refused};

/// What an answer tells beside the protocol's fields when it is asked to.
fn parsed(info: &HashMap<String, String>) -> Result<serde_json::Value> {
    let text = info.get("info").context("no verbose information")?;
    serde_json::from_str(text).context(text.clone())
}

#[test]
fn the_runtime_names_itself_its_handlers_and_its_cgroup_driver() -> Result<()> {
    let node = drupe()?;
    let cri = node.cri()?;
    let version = cri.version(VersionRequest::default())?;
    assert_eq!(version.runtime_name, "drupe");
    assert_eq!(version.runtime_api_version, "v1");
    ensure!(!version.runtime_version.is_empty(), "{version:?}");

    let brief = cri.status(StatusRequest { verbose: false })?;
    ensure!(brief.info.is_empty(), "{:?}", brief.info);
    let status = cri.status(StatusRequest { verbose: true })?;
    for condition in ["RuntimeReady", "NetworkReady"] {
        let conditions = &status.status.as_ref().context("status")?.conditions;
        let ready = conditions.iter().any(|c| c.r#type == condition && c.status);
        ensure!(ready, "{condition} is not true: {conditions:?}");
    }
    let handlers: Vec<_> = status.runtime_handlers.iter().map(|h| &h.name).collect();
    assert_eq!(handlers, ["host", "microvm", ""]);
    for handler in &status.runtime_handlers {
        let features = handler.features.unwrap_or_default();
        if handler.name == "host" {
            ensure!(!features.user_namespaces, "{handler:?}");
        } else {
            ensure!(features.recursive_read_only_mounts, "{handler:?}");
            ensure!(features.user_namespaces, "{handler:?}");
        }
    }
    let info = parsed(&status.info)?;
    assert_eq!(info["root"], json!(node.root()));
    assert_eq!(info["defaultRuntime"], "microvm");

    let config = cri.runtime_config(RuntimeConfigRequest {})?;
    let linux = config.linux.context("no configuration for linux")?;
    assert_eq!(linux.cgroup_driver(), CgroupDriver::Cgroupfs);
    node.finish()
}

#[test]
fn the_nodes_pod_addresses_are_taken_and_a_bad_range_is_named() -> Result<()> {
    let node = drupe()?;
    let cri = node.cri()?;
    let update = |pod_cidr: &str| {
        let network_config = Some(NetworkConfig {
            pod_cidr: pod_cidr.to_owned(),
        });
        cri.update_runtime_config(UpdateRuntimeConfigRequest {
            runtime_config: Some(RuntimeConfig { network_config }),
        })
    };
    update("10.88.0.0/24,fd00:88::/64")?;
    refused(
        update("10.88.0.0/33"),
        Code::InvalidArgument,
        &["pod_cidr", "10.88.0.0/33"],
    )?;
    node.finish()
}

#[test]
fn a_container_is_shown_in_detail_when_asked() -> Result<()> {
    let node = drupe()?;
    node.pull_busybox()?;
    let pod = node.run_pod("detail")?;
    let container = pod.start_idle("c")?;
    let show = |verbose: bool| {
        node.cri()?
            .container_status(ContainerStatusRequest {
                container_id: container.id.clone(),
                verbose,
            })
            .context("ContainerStatus")
    };
    ensure!(show(false)?.info.is_empty());
    let verbose = show(true)?;
    let info = parsed(&verbose.info)?;
    assert_eq!(info["sandboxID"], json!(pod.id));
    ensure!(info["pid"].as_u64().is_some_and(|pid| pid > 0), "{info}");

    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let verbose = node.cri()?.pod_sandbox_status(request)?;
    assert_eq!(verbose.containers_statuses.len(), 1);
    let info = parsed(&verbose.info)?;
    // The process that is the pod, and where its console is.
    let pid = info["pid"].as_u64().context("no pid")?;
    let processes = node.pod_processes()?;
    let line = processes.get(&u32::try_from(pid)?).cloned();
    ensure!(
        line.as_ref().is_some_and(|line| line.contains("drupe-vmm")),
        "process {pid} is {line:?}"
    );
    let console = info["console"].as_str().context("no console")?;
    ensure!(std::fs::metadata(console)?.is_file(), "{console}");
    node.finish()
}

#[test]
fn lists_come_as_streams_of_the_same_items() -> Result<()> {
    let node = drupe()?;
    node.pull_busybox()?;
    let pod = node.run_pod("listed")?;
    let containers = [pod.start_idle("a")?, pod.start_idle("b")?];
    let cri = node.cri()?;

    let pods = cri.stream_pod_sandboxes(StreamPodSandboxesRequest { filter: None })?;
    let pods: Vec<_> = pods.into_iter().flat_map(|m| m.pod_sandboxes).collect();
    assert_eq!(pods.len(), 1);
    let listed = cri.list_pod_sandbox(ListPodSandboxRequest { filter: None })?;
    assert_eq!(pods, listed.items);

    let of_pod = cri.stream_containers(StreamContainersRequest { filter: None })?;
    let of_pod: Vec<_> = of_pod.into_iter().flat_map(|m| m.containers).collect();
    assert_eq!(of_pod.len(), 2);
    let listed = cri.list_containers(ListContainersRequest { filter: None })?;
    assert_eq!(of_pod, listed.containers);

    let images = cri.stream_images(StreamImagesRequest { filter: None })?;
    let images: Vec<_> = images.into_iter().flat_map(|m| m.images).collect();
    assert_eq!(images.len(), 1);
    let listed = cri.list_images(ListImagesRequest { filter: None })?;
    assert_eq!(images, listed.images);

    // Figures change between two calls; the filter is the list's.
    let filter = Some(ContainerStatsFilter {
        id: containers[1].id.clone(),
        ..Default::default()
    });
    let stats = cri.stream_container_stats(StreamContainerStatsRequest { filter })?;
    let stats = stats.into_iter().flat_map(|m| m.container_stats);
    let ids: Vec<_> = stats.filter_map(|s| Some(s.attributes?.id)).collect();
    assert_eq!(ids, std::slice::from_ref(&containers[1].id));
    let stats = cri.stream_pod_sandbox_stats(StreamPodSandboxStatsRequest { filter: None })?;
    let stats = stats.into_iter().flat_map(|m| m.pod_sandbox_stats);
    let ids: Vec<_> = stats.filter_map(|s| Some(s.attributes?.id)).collect();
    assert_eq!(ids, std::slice::from_ref(&pod.id));

    let filter = Some(ContainerFilter {
        id: "none".to_owned(),
        ..Default::default()
    });
    let none = cri.stream_containers(StreamContainersRequest { filter })?;
    ensure!(none.is_empty(), "an empty list is a message: {none:?}");
    node.finish()
}

#[test]
fn a_checkpoint_is_refused_with_the_reason() -> Result<()> {
    let node = drupe()?;
    let answer = node
        .cri()?
        .checkpoint_container(CheckpointContainerRequest::default());
    let parts = ["CheckpointContainer", "virtual machine"];
    refused(answer, Code::Unimplemented, &parts)?;
    node.finish()
}

/// Runs the daemon's program with other arguments than the harness does.
fn run(args: &[&str]) -> Result<Output> {
    Command::new(artifacts::daemon()?)
        .args(args)
        .output()
        .context("drupe")
}

#[test]
fn a_node_is_told_what_it_lacks_and_the_remedy() -> Result<()> {
    let node = Node::builder().server(Server::Drupe).prepare()?;
    let config = node.config_file().display().to_string();
    let good = run(&["check", "--config", &config])?;
    let said = String::from_utf8_lossy(&good.stdout).into_owned();
    ensure!(good.status.success(), "{said}");
    ensure!(
        said.contains("Pods can run") && !said.contains("BAD"),
        "{said}"
    );

    node.edit_config(|config| {
        config["runtimes"]["microvm"]["kernel"] = json!("/no/such/kernel");
        config["network"]["bin_dirs"] = json!(["/no/such/plugins"]);
    })?;
    let bad = run(&["check", "--config", &config])?;
    let said = String::from_utf8_lossy(&bad.stdout).into_owned();
    assert_eq!(bad.status.code(), Some(1), "{said}");
    for (missing, remedy) in [
        ("/no/such/kernel", "set `kernel`"),
        ("/no/such/plugins", "containernetworking-plugins"),
    ] {
        let mut lines = said.lines().skip_while(|line| !line.contains(missing));
        ensure!(lines.next().is_some(), "{missing} is not in: {said}");
        ensure!(
            lines.next().is_some_and(|line| line.contains(remedy)),
            "{remedy} does not follow {missing} in: {said}"
        );
    }
    ensure!(said.contains("Pods cannot run"), "{said}");
    node.finish_without_server()
}

#[test]
fn the_printed_configuration_is_one_that_is_taken() -> Result<()> {
    let printed = run(&["config"])?;
    ensure!(printed.status.success());
    let text = String::from_utf8(printed.stdout)?;
    let keys = text.lines().filter(|line| line.contains(": ")).count();
    let comments = text.lines().filter(|line| line.trim().starts_with('#'));
    ensure!(keys > 10 && comments.count() > 10, "{text}");
    let node = Node::builder().server(Server::Drupe).prepare()?;
    node.write_config(&text)?;
    let checked = run(&[
        "check",
        "--config",
        &node.config_file().display().to_string(),
    ])?;
    // 2 is for a configuration that is refused.
    ensure!(
        matches!(checked.status.code(), Some(0 | 1)),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );
    node.finish_without_server()
}
