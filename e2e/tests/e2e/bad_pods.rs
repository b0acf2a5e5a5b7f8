//! Pods and containers that cannot be: a clear refusal, and nothing left.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::Node;
use k8s_cri::v1::*;
use serde_json::json;
use tonic::Code;

use crate::{refused, shares_the_hosts_kernel, with_node};

/// Runs `test` on a node whose answers are drupe's own to give.
fn with_drupe(node: Node, test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    if !shares_the_hosts_kernel(&node) {
        test(&node)?;
    }
    node.finish()
}

#[test]
fn unknown_ids_are_not_found_and_nothing_to_stop_or_remove() -> Result<()> {
    with_drupe(Node::start()?, |node| {
        let cri = node.cri()?;
        let pod_sandbox_id = "f00d".repeat(16);
        let container_id = "cafe".repeat(16);
        let pod = &[pod_sandbox_id.as_str()];
        let container = &[container_id.as_str()];
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
            verbose: false,
        };
        refused(cri.pod_sandbox_status(request), Code::NotFound, pod)?;
        let request = PodSandboxStatsRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        refused(cri.pod_sandbox_stats(request), Code::NotFound, pod)?;
        let request = ContainerStatusRequest {
            container_id: container_id.clone(),
            verbose: false,
        };
        refused(cri.container_status(request), Code::NotFound, container)?;
        let request = StartContainerRequest {
            container_id: container_id.clone(),
        };
        refused(cri.start_container(request), Code::NotFound, container)?;
        let request = ExecSyncRequest {
            container_id: container_id.clone(),
            cmd: vec!["true".to_owned()],
            timeout: 0,
        };
        refused(cri.exec_sync(request), Code::NotFound, container)?;
        let request = ContainerStatsRequest {
            container_id: container_id.clone(),
        };
        refused(cri.container_stats(request), Code::NotFound, container)?;
        let request = ReopenContainerLogRequest {
            container_id: container_id.clone(),
        };
        refused(cri.reopen_container_log(request), Code::NotFound, container)?;

        cri.stop_pod_sandbox(StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        })?;
        cri.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id })?;
        cri.stop_container(StopContainerRequest {
            container_id: container_id.clone(),
            timeout: 0,
        })?;
        cri.remove_container(RemoveContainerRequest { container_id })?;
        Ok(())
    })
}

#[test]
fn a_request_without_what_it_needs_names_the_field() -> Result<()> {
    with_drupe(Node::start()?, |node| {
        let cri = node.cri()?;
        let run = |config: Option<PodSandboxConfig>, handler: &str| {
            cri.run_pod_sandbox(RunPodSandboxRequest {
                config,
                runtime_handler: handler.to_owned(),
            })
        };
        refused(run(None, ""), Code::InvalidArgument, &["config"])?;
        let good = node.pod_config("fields");
        refused(
            run(
                Some(PodSandboxConfig {
                    metadata: None,
                    ..good.clone()
                }),
                "",
            ),
            Code::InvalidArgument,
            &["metadata"],
        )?;
        let hostname = "h".repeat(100);
        refused(
            run(
                Some(PodSandboxConfig {
                    hostname,
                    ..good.clone()
                }),
                "",
            ),
            Code::InvalidArgument,
            &["hostname"],
        )?;
        let log_directory = "relative/path".to_owned();
        refused(
            run(
                Some(PodSandboxConfig {
                    log_directory,
                    ..good.clone()
                }),
                "",
            ),
            Code::InvalidArgument,
            &["log_directory", "relative/path"],
        )?;
        refused(
            run(Some(good.clone()), "no-such-handler"),
            Code::InvalidArgument,
            &["no-such-handler", "microvm"],
        )?;
        let mut host_network = good.clone();
        host_network.linux.get_or_insert_default().security_context =
            Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    network: NamespaceMode::Node.into(),
                    ..Default::default()
                }),
                ..Default::default()
            });
        let answer = run(Some(host_network), "")
            .err()
            .context("a host network pod was accepted")?;
        ensure!(answer.message().contains("network"), "{answer:?}");
        let mut ports = good;
        ports.port_mappings = vec![PortMapping {
            host_port: 99_999,
            container_port: 80,
            ..Default::default()
        }];
        refused(
            run(Some(ports), ""),
            Code::InvalidArgument,
            &["port", "99999"],
        )?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_name_that_is_taken_is_refused() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(());
        }
        let pod = node.run_pod("unique")?;
        refused(
            node.try_run_pod(pod.config.clone()).map(|pod| pod.id),
            Code::AlreadyExists,
            &["unique", &pod.id],
        )?;
        let container = pod.start_idle("c")?;
        let second = pod
            .create(pod.container_config("c", e2e::pod::IDLE))
            .map(|c| c.id);
        refused(second, Code::AlreadyExists, &["c", &container.id])?;
        // The next attempt of the same pod is another pod.
        let mut next = pod.config.clone();
        next.metadata.get_or_insert_default().attempt = 1;
        node.run_pod_with(next).map(drop)
    })
}

#[test]
fn a_missing_log_directory_is_named() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(());
        }
        let mut config = node.pod_config("logless");
        config.log_directory = node.dir.join("not-there").display().to_string();
        // Where it is noticed is the runtime's choice: with the pod or with
        // its first container.
        match node.try_run_pod(config) {
            Err(status) => {
                refused(Err::<(), _>(status), Code::InvalidArgument, &["not-there"]).map(drop)
            }
            Ok(pod) => {
                let container = pod
                    .create(pod.container_config("c", e2e::pod::IDLE))
                    .and_then(|c| c.start());
                refused(container, Code::InvalidArgument, &["not-there"]).map(drop)
            }
        }
    })
}

#[test]
fn a_missing_mount_source_is_named() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(());
        }
        let pod = node.run_pod("sourceless")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        let host_path = node.dir.join("no-source").display().to_string();
        config.mounts = vec![Mount {
            container_path: "/data".to_owned(),
            host_path,
            ..Default::default()
        }];
        refused(
            pod.create(config).map(|c| c.id),
            Code::InvalidArgument,
            &["no-source"],
        )?;
        ensure!(
            node.cri()?
                .list_containers(ListContainersRequest::default())?
                .containers
                .is_empty()
        );
        // The name is free again.
        pod.start_idle("c").map(drop)
    })
}

#[test]
fn a_user_that_the_image_does_not_have_is_named() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(());
        }
        let pod = node.run_pod("userless")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        config
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default()
            .run_as_username = "mallory".to_owned();
        refused(
            pod.create(config).map(|c| c.id),
            Code::InvalidArgument,
            &["mallory"],
        )?;
        ensure!(
            node.cri()?
                .list_containers(ListContainersRequest::default())?
                .containers
                .is_empty()
        );
        Ok(())
    })
}

#[test]
fn a_missing_executable_is_a_start_error() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(());
        }
        let pod = node.run_pod("commandless")?;
        let container = pod.create(pod.container_config("c", &["/no/such/program", "x"]))?;
        refused(container.start(), Code::NotFound, &["/no/such/program"])?;
        let status = container.status()?;
        assert_eq!(status.state(), ContainerState::ContainerExited);
        assert_eq!(
            (status.reason.as_str(), status.exit_code),
            ("StartError", 128)
        );
        ensure!(
            status.message.contains("/no/such/program"),
            "{}",
            status.message
        );
        // A missing executable in an exec is the command's failure.
        let idle = pod.start_idle("idle")?;
        let exec = idle.exec_sync(&["/no/such/program"], 10);
        let named = match &exec {
            Ok(answer) => answer.exit_code != 0,
            Err(status) => status.message().contains("/no/such/program"),
        };
        ensure!(named, "{exec:?}");
        Ok(())
    })
}

#[test]
fn a_container_of_an_image_that_is_not_here_is_refused() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("imageless")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        config.image.get_or_insert_default().image =
            "127.0.0.1:5000/never-pulled:latest".to_owned();
        let answer = pod.create(config).map(|c| c.id);
        if shares_the_hosts_kernel(node) {
            ensure!(answer.is_err());
            return Ok(());
        }
        refused(answer, Code::NotFound, &["never-pulled"]).map(drop)
    })
}

#[test]
fn calls_out_of_order_are_refused() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(());
        }
        let pod = node.run_pod("order")?;
        let container = pod.create(pod.container_config("c", e2e::pod::IDLE))?;
        refused(
            container.exec_sync(&["true"], 5),
            Code::FailedPrecondition,
            &[&container.id],
        )?;
        container.start()?;
        refused(
            container.start(),
            Code::FailedPrecondition,
            &[&container.id],
        )?;
        container.stop(5)?;
        refused(
            container.exec_sync(&["true"], 5),
            Code::FailedPrecondition,
            &[&container.id],
        )?;
        pod.stop()?;
        let late = pod
            .create(pod.container_config("late", e2e::pod::IDLE))
            .map(|c| c.id);
        refused(late, Code::FailedPrecondition, &[&pod.id]).map(drop)
    })
}

#[test]
fn a_failing_cni_plugin_is_quoted_and_nothing_is_left() -> Result<()> {
    let node = Node::builder()
        .cni(|conf| append_plugin(conf, "e2e-fails"))
        .prepare()?;
    node.write_plugin(
        "e2e-fails",
        r#"#!/bin/sh
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"1.0.0","code":100,"msg":"no cherries today","details":"sold out"}'; exit 1 ;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}' ;;
esac
"#,
    )?;
    node.start_server()?;
    with_drupe(node, |node| {
        let answer = node
            .try_run_pod(node.pod_config("unplugged"))
            .map(|pod| pod.id);
        let message = refused(answer, Code::Internal, &["e2e-fails", "no cherries today"])?;
        ensure!(message.contains("cni"), "the phase is not named: {message}");
        ensure!(
            node.cri()?
                .list_pod_sandbox(ListPodSandboxRequest::default())?
                .items
                .is_empty()
        );
        node.assert_no_pod_left()
    })
}

#[test]
fn a_cni_plugin_that_hangs_is_given_up() -> Result<()> {
    let node = Node::builder()
        .cni(|conf| append_plugin(conf, "e2e-hangs"))
        .config(|config| config["network"]["plugin_timeout_seconds"] = json!(2))
        .prepare()?;
    let script = "#!/bin/sh\nif [ \"$CNI_COMMAND\" = ADD ]; then sleep 54321 & wait; fi\necho '{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}'\n";
    node.write_plugin("e2e-hangs", script)?;
    node.start_server()?;
    with_drupe(node, |node| {
        let begun = Instant::now();
        let answer = node
            .try_run_pod(node.pod_config("hanging"))
            .map(|pod| pod.id);
        refused(answer, Code::DeadlineExceeded, &["e2e-hangs", "2 s"])?;
        ensure!(
            begun.elapsed() < Duration::from_secs(20),
            "it took {:?}",
            begun.elapsed()
        );
        node.assert_no_pod_left()
    })
}

fn append_plugin(conflist: &mut serde_json::Value, name: &str) {
    if let Some(plugins) = conflist["plugins"].as_array_mut() {
        plugins.push(json!({ "type": name }));
    }
}

#[test]
fn a_pod_on_a_node_without_network_configuration_is_refused() -> Result<()> {
    let node = Node::builder()
        .cni(|conflist| *conflist = serde_json::Value::Null)
        .start()?;
    with_drupe(node, |node| {
        let answer = node
            .try_run_pod(node.pod_config("netless"))
            .map(|pod| pod.id);
        let status = answer.err().context("a pod came up without a network")?;
        ensure!(
            status
                .message()
                .contains(&node.cni_dir().display().to_string()),
            "{status:?}"
        );
        node.assert_no_pod_left()
    })
}

#[test]
fn a_guest_kernel_that_does_not_boot_is_told_with_its_last_words() -> Result<()> {
    let node = Node::builder()
        .config(|config| {
            config["runtimes"]["microvm"]["kernel_args"] = json!(["rdinit=/no/such/init"])
        })
        .start()?;
    with_drupe(node, |node| {
        let begun = Instant::now();
        let answer = node
            .try_run_pod(node.pod_config("panics"))
            .map(|pod| pod.id);
        let status = answer.err().context("a guest without an init came up")?;
        for part in ["phase boot", "Kernel panic"] {
            ensure!(
                status.message().contains(part),
                "{part:?} is not in: {}",
                status.message()
            );
        }
        ensure!(
            begun.elapsed() < Duration::from_secs(20),
            "it took {:?}",
            begun.elapsed()
        );
        node.assert_no_pod_left()
    })
}

#[test]
fn a_guest_kernel_that_is_no_kernel_is_named() -> Result<()> {
    let node = Node::builder().prepare()?;
    let broken = node.dir.join("broken-kernel");
    fs::write(&broken, "not a kernel")?;
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(node.config_file())?).unwrap_or_default();
    if !shares_the_hosts_kernel(&node) {
        config["runtimes"]["microvm"]["kernel"] = json!(broken);
        node.write_config(&config.to_string())?;
    }
    node.start_server()?;
    with_drupe(node, |node| {
        let answer = node
            .try_run_pod(node.pod_config("kernelless"))
            .map(|pod| pod.id);
        let status = answer.err().context("a pod came up without a kernel")?;
        let message = status.message();
        ensure!(
            message.contains("vmm") || message.contains("boot"),
            "the phase is not named: {message}"
        );
        node.assert_no_pod_left()
    })
}

#[test]
fn what_is_not_there_yet_is_unimplemented() -> Result<()> {
    with_drupe(Node::start()?, |node| {
        let request = CheckpointContainerRequest {
            container_id: "x".to_owned(),
            ..Default::default()
        };
        refused(
            node.cri()?.checkpoint_container(request),
            Code::Unimplemented,
            &[],
        )
        .map(drop)
    })
}
