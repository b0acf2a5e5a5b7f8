//! Pods that cannot be: a clear refusal, and nothing left.

use std::fs;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::Node;
use tonic::Code;

use crate::bad_containers::assert_no_container;
use crate::{on_drupe, pod_refused, refused, shares_the_hosts_kernel, with_drupe};

#[test]
fn unknown_ids_are_not_found_and_nothing_to_stop_or_remove() -> Result<()> {
    on_drupe(Node::start()?, |node| {
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
    on_drupe(Node::start()?, |node| {
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
        let mut ports = good.clone();
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
        let mut to_none = good;
        to_none.port_mappings = vec![PortMapping {
            host_port: 18_080,
            ..Default::default()
        }];
        refused(
            run(Some(to_none), ""),
            Code::InvalidArgument,
            &["config.port_mappings.container_port", "18080"],
        )?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_name_that_is_taken_is_refused() -> Result<()> {
    with_drupe(|node| {
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
    with_drupe(|node| {
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
fn a_full_disk_fails_the_pod_and_not_those_that_run() -> Result<()> {
    let node = Node::builder().prepare()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish_without_server();
    }
    let small = node.root();
    node.mount_small_root("32m")?;
    node.start_server()?;
    node.pull_busybox()?;

    // The very first pod, which would have its disk's template made too, then
    // one that finds the template there.
    for (name, free) in [("first", 0), ("template", 256 << 10)] {
        fill(&small, free)?;
        pod_refused(&node, name, Code::ResourceExhausted, &["No space left"])
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
    pod_refused(
        &node,
        "late",
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
    node.finish_with_small_root()
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
