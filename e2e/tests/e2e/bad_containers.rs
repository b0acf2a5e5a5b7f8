//! Containers that cannot be: a clear refusal, and nothing left.

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::Node;
use tonic::Code;

use crate::{refused, shares_the_hosts_kernel, with_drupe, with_node};

/// Fails if a refused container is listed.
pub(crate) fn assert_no_container(node: &Node) -> Result<()> {
    let containers = node
        .cri()?
        .list_containers(ListContainersRequest::default())?
        .containers;
    ensure!(containers.is_empty(), "{containers:?}");
    Ok(())
}

#[test]
fn a_mount_source_that_cannot_be_is_named_and_a_missing_one_is_made() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("sourceless")?;
        let with = |name: &str, path: &str| {
            let mut config = pod.container_config(name, e2e::pod::IDLE);
            config.mounts = vec![Mount {
                container_path: "/data".to_owned(),
                host_path: node.dir.join(path).display().to_string(),
                ..Default::default()
            }];
            config
        };
        std::fs::write(node.dir.join("file"), "")?;
        refused(
            pod.create(with("c", "file/below")).map(|c| c.id),
            Code::InvalidArgument,
            &["file/below", "Not a directory"],
        )?;
        assert_no_container(node)?;
        // The name is free again. As with every runtime, a path that is not
        // there is a directory from here on.
        let container = pod.start_with(with("c", "no-source"))?;
        container.exec(&["touch", "/data/x"])?;
        ensure!(node.dir.join("no-source/x").exists(), "it is elsewhere");
        Ok(())
    })
}

#[test]
fn a_user_that_the_image_does_not_have_is_named() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("userless")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        e2e::pod::security(&mut config).run_as_username = "mallory".to_owned();
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
            e2e::pod::security(&mut config).run_as_username = "mallory".to_owned();
            let again = pod.create(config).map(|c| c.id);
            refused(again, Code::InvalidArgument, &["mallory"])?;
        }
        pod.start_idle("c").map(drop)
    })
}

#[test]
fn a_missing_executable_is_a_start_error() -> Result<()> {
    with_drupe(|node| {
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
    with_drupe(|node| {
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
        refused(container.stop(-1), Code::InvalidArgument, &["timeout"])?;
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
