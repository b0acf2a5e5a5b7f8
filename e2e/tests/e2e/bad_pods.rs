//! Pods and containers that cannot be: a clear refusal, and nothing left.

use std::fs;
use std::os::unix::fs::PermissionsExt;
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
        let request = CreateContainerRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
            config: Some(ContainerConfig {
                metadata: Some(ContainerMetadata {
                    name: "c".to_owned(),
                    attempt: 0,
                }),
                image: Some(e2e::cri::image_spec(e2e::node::BUSYBOX)),
                ..Default::default()
            }),
            sandbox_config: None,
        };
        refused(cri.create_container(request), Code::NotFound, pod)?;

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
        refused(
            run(Some(host_network), ""),
            Code::Unimplemented,
            &["network"],
        )?;
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
                let answer = Err::<(), _>(status);
                refused(
                    answer,
                    Code::InvalidArgument,
                    &["not-there", "No such file"],
                )?;
            }
            Ok(pod) => {
                let container = pod
                    .create(pod.container_config("c", e2e::pod::IDLE))
                    .and_then(|c| c.start());
                refused(
                    container,
                    Code::InvalidArgument,
                    &["not-there", "No such file"],
                )?;
                assert_no_container(node)?;
                pod.remove()?;
            }
        }
        ensure!(!node.dir.join("not-there").exists(), "it was made");
        node.assert_no_pod_left()
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
            &["no-source", "No such file"],
        )?;
        ensure!(!node.dir.join("no-source").exists(), "it was made");
        assert_no_container(node)?;
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
            &["mallory", "passwd"],
        )?;
        assert_no_container(node)?;
        let logs = e2e::leaks::files_below(pod.config.log_directory.as_ref())?;
        ensure!(logs.is_empty(), "{logs:?}");
        // The name is free again, and so is what it held in the guest.
        for n in 0..10 {
            let mut config = pod.container_config("c", e2e::pod::IDLE);
            config.metadata.get_or_insert_default().attempt = n;
            config
                .linux
                .get_or_insert_default()
                .security_context
                .get_or_insert_default()
                .run_as_username = "mallory".to_owned();
            let again = pod.create(config).map(|c| c.id);
            refused(again, Code::InvalidArgument, &["mallory"])?;
        }
        pod.start_idle("c").map(drop)
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
        let idle = pod.start_idle("idle")?;
        let exec = idle.exec_sync(&["/no/such/program"], 10);
        refused(exec, Code::NotFound, &["/no/such/program"])?;
        // Neither holds up what comes next.
        idle.exec(&["true"])?;
        container.remove()?;
        let config = pod.container_config("c", &["true"]);
        assert_eq!(pod.start_with(config)?.wait_exit()?.exit_code, 0);
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
            begun.elapsed() < e2e::patient(Duration::from_secs(20)),
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
        // The panic's reason, and the console's lines around it.
        refused(
            answer,
            Code::Internal,
            &[
                "phase boot",
                "kernel panic: ",
                "console",
                "Kernel panic - not syncing",
            ],
        )?;
        ensure!(
            begun.elapsed() < e2e::patient(Duration::from_secs(20)),
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
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755))?;
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
        refused(
            answer,
            Code::Internal,
            &["phase vmm", "broken-kernel", "is no kernel"],
        )?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_guest_that_never_reports_ready_is_given_up_with_its_last_words() -> Result<()> {
    let node = Node::builder()
        .config(|config| config["runtimes"]["microvm"]["boot_timeout_seconds"] = json!(2))
        .prepare()?;
    let initramfs = silent_initramfs(&node)?;
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(node.config_file())?).unwrap_or_default();
    if !shares_the_hosts_kernel(&node) {
        config["runtimes"]["microvm"]["initramfs"] = json!(initramfs);
        node.write_config(&config.to_string())?;
    }
    node.start_server()?;
    with_drupe(node, |node| {
        let begun = Instant::now();
        let answer = node
            .try_run_pod(node.pod_config("silent"))
            .map(|pod| pod.id);
        refused(
            answer,
            Code::DeadlineExceeded,
            &["phase boot", "2 s", "console", "no agent in here"],
        )?;
        ensure!(
            begun.elapsed() < e2e::patient(Duration::from_secs(20)),
            "it took {:?}",
            begun.elapsed()
        );
        node.assert_no_pod_left()
    })
}

/// An initramfs that boots, says something and then nothing.
fn silent_initramfs(node: &Node) -> Result<std::path::PathBuf> {
    let script = "set -e; mkdir -p tree/bin tree/dev; cd tree; cp /bin/busybox bin; \
                  printf '#!/bin/busybox sh\nbusybox mount -t devtmpfs none /dev\n\
                  echo no agent in here > /dev/console\nexec busybox sleep 100000\n' > init; \
                  chmod 755 init; find . | cpio --quiet -o -H newc > ../silent";
    let output = std::process::Command::new("sh")
        .args(["-c", script])
        .current_dir(&node.dir)
        .output()
        .context("sh")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(node.dir.join("silent"))
}

#[test]
fn a_full_disk_fails_the_pod_and_not_those_that_run() -> Result<()> {
    let node = Node::builder().prepare()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish_without_server();
    }
    let small = node.root();
    nix::mount::mount(
        Some("tmpfs"),
        &small,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=32m"),
    )
    .context("mount a small file system")?;
    node.start_server()?;
    node.pull_busybox()?;

    // The very first pod, which would have its disk's template made too, then
    // one that finds the template there.
    for (name, free) in [("first", 0), ("template", 256 << 10)] {
        fill(&small, free)?;
        let answer = node.try_run_pod(node.pod_config(name)).map(|pod| pod.id);
        refused(answer, Code::ResourceExhausted, &["No space left"])
            .with_context(|| format!("{free} bytes free"))?;
        let pods = node
            .cri()?
            .list_pod_sandbox(ListPodSandboxRequest::default())?
            .items;
        ensure!(pods.is_empty(), "{pods:?}");
        node.assert_no_pod_left_on(&small)?;
        fs::remove_file(small.join("filler"))?;
    }
    let pod = node.run_pod("resident")?;
    let container = pod.start_idle("c")?;
    fill(&small, 64 << 10)?;
    let answer = node.try_run_pod(node.pod_config("late")).map(|pod| pod.id);
    refused(
        answer,
        Code::ResourceExhausted,
        &["phase scratch", "No space left"],
    )?;
    fill(&small, 0)?;
    let created = pod
        .create(pod.container_config("more", e2e::pod::IDLE))
        .map(|c| c.id);
    refused(created, Code::ResourceExhausted, &["No space left"])?;
    assert_eq!(container.exec(&["echo", "still here"])?, "still here");
    // Whoever has to make room can.
    pod.stop()?;
    pod.remove()?;
    node.assert_no_pod_left_on(&small)?;
    fs::remove_file(small.join("filler"))?;

    node.run_pod("after")?.start_idle("c")?.exec(&["true"])?;
    node.remove_all_pods()?;
    node.stop_server()?;
    nix::mount::umount2(&small, nix::mount::MntFlags::empty()).context("unmount")?;
    node.start_server()?;
    node.finish()
}

/// Fills the file system at `dir` until `free` bytes are left.
fn fill(dir: &std::path::Path, free: u64) -> Result<()> {
    use std::io::Write;
    let path = dir.join("filler");
    let mut file = fs::File::options().create(true).append(true).open(&path)?;
    let full = loop {
        if let Err(error) = file.write_all(&[1; 4096]) {
            break error;
        }
    };
    ensure!(full.kind() == std::io::ErrorKind::StorageFull, "{full}");
    let length = file.metadata()?.len();
    file.set_len(length.saturating_sub(free))?;
    Ok(())
}

fn assert_no_container(node: &Node) -> Result<()> {
    let containers = node
        .cri()?
        .list_containers(ListContainersRequest::default())?
        .containers;
    ensure!(containers.is_empty(), "{containers:?}");
    Ok(())
}
