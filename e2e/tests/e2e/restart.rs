//! The daemon may end at any time: pods do not notice, and the next daemon
//! takes them up.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::log::{self, Stream};
use e2e::{Node, eventually};

use crate::{shares_the_hosts_kernel, with_drupe, with_node};

/// A container that writes a number ten times a second.
const COUNTER: &[&str] = &[
    "sh",
    "-c",
    "n=0; while :; do echo $n; n=$((n+1)); sleep 0.1; done",
];

fn lines(container: &e2e::Container) -> Result<usize> {
    Ok(container.stdout().map_or(0, |text| text.lines().count()))
}

fn await_lines(container: &e2e::Container, count: usize) -> Result<()> {
    eventually(
        &format!("{count} lines of output"),
        Duration::from_secs(20),
        || {
            let now = lines(container)?;
            ensure!(now >= count, "{now} lines");
            Ok::<_, anyhow::Error>(())
        },
    )
}

#[test]
fn pods_run_on_while_the_daemon_is_dead_and_are_taken_up() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(()); // containerd's containers stop writing when it ends.
        }
        let pod = node.run_pod("survivor")?;
        let counter = pod.start("counter", COUNTER)?;
        let created = pod.create(pod.container_config("created", &["echo", "late"]))?;
        let ended = pod.start("ended", &["sh", "-c", "exit 5"])?;
        let ended_before = ended.wait_exit()?;
        let stopped = node.run_pod("stopped")?;
        stopped.stop()?;
        await_lines(&counter, 3)?;
        let (pod_before, counter_before) = (pod.status()?, counter.status()?);

        node.kill_server()?;
        let at_death = lines(&counter)?;
        await_lines(&counter, at_death + 10)?;
        node.start_server()?;

        assert_eq!(pod.status()?, pod_before);
        assert_eq!(counter.status()?, counter_before);
        assert_eq!(ended.status()?, ended_before);
        assert_eq!(created.status()?.state(), ContainerState::ContainerCreated);
        assert_eq!(stopped.status()?.state(), PodSandboxState::SandboxNotready);

        assert_eq!(counter.exec(&["echo", "still here"])?, "still here");
        created.start()?;
        assert_eq!(created.wait_exit()?.exit_code, 0);
        assert_eq!(created.stdout()?, "late\n");
        counter.stop(0)?;
        let written = log::written(&log::read(&counter.log)?, Stream::Stdout);
        let count = written.iter().filter(|byte| **byte == b'\n').count();
        let expected: String = (0..count).map(|n| format!("{n}\n")).collect();
        ensure!(written == expected.as_bytes(), "a line was lost or doubled");
        // What was taken up can be used like what was made.
        pod.start_idle("after")?.exec(&["true"])?;
        node.run_pod("another")?
            .start_idle("c")?
            .exec(&["true"])
            .map(drop)
    })
}

#[test]
fn an_orderly_stop_leaves_pods_running_too() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(()); // containerd's containers stop writing when it ends.
        }
        let pod = node.run_pod("upgrade")?;
        let counter = pod.start("counter", COUNTER)?;
        node.stop_server()?;
        let at_stop = lines(&counter)?;
        await_lines(&counter, at_stop + 5)?;
        node.start_server()?;
        assert_eq!(counter.status()?.state(), ContainerState::ContainerRunning);
        counter.exec(&["true"]).map(drop)
    })
}

#[test]
fn a_container_that_ends_while_the_daemon_is_dead_is_reported() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(()); // containerd's containers stop writing when it ends.
        }
        let pod = node.run_pod("meanwhile")?;
        let gate = node.dir.join("gate");
        fs::create_dir(&gate)?;
        let mut config = pod.container_config(
            "c",
            &[
                "sh",
                "-c",
                "while [ ! -e /gate/open ]; do sleep 0.05; done; echo bye; exit 9",
            ],
        );
        config.mounts = vec![Mount {
            container_path: "/gate".to_owned(),
            host_path: gate.display().to_string(),
            ..Default::default()
        }];
        let container = pod.start_with(config)?;
        node.kill_server()?;
        fs::write(gate.join("open"), "")?;
        eventually(
            "the container's last words",
            Duration::from_secs(10),
            || {
                ensure!(container.stdout()? == "bye\n", "nothing yet");
                Ok::<_, anyhow::Error>(())
            },
        )?;
        node.start_server()?;
        let status = container.wait_exit()?;
        assert_eq!((status.exit_code, status.reason.as_str()), (9, "Error"));
        Ok(())
    })
}

#[test]
fn a_pod_whose_machine_died_with_the_daemon_is_not_ready_and_can_be_removed() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("crashed")?;
        let container = pod.start_idle("c")?;
        node.kill_server()?;
        node.kill_pod_processes()?;
        node.start_server()?;
        assert_eq!(pod.status()?.state(), PodSandboxState::SandboxNotready);
        let status = container.status()?;
        assert_eq!(status.state(), ContainerState::ContainerExited);
        ensure!(
            status.exit_code != 0,
            "a container that was killed ended with 0"
        );
        pod.stop()?;
        pod.remove()?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_machine_that_dies_is_noticed_at_once() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("dying")?;
        let container = pod.start_idle("c")?;
        node.kill_pod_processes()?;
        eventually("the pod to be not ready", Duration::from_secs(5), || {
            ensure!(
                pod.status()?.state() == PodSandboxState::SandboxNotready,
                "it is ready"
            );
            ensure!(
                container.status()?.state() == ContainerState::ContainerExited,
                "its container runs"
            );
            Ok::<_, anyhow::Error>(())
        })?;
        pod.stop()?;
        pod.remove()?;
        node.assert_no_pod_left()
    })
}

#[test]
fn images_outlive_the_daemon() -> Result<()> {
    let node = Node::start()?;
    node.pull_busybox()?;
    node.kill_server()?;
    node.start_server()?;
    ensure!(
        node.cri()?.find_image(e2e::node::BUSYBOX)?.is_some(),
        "the image is gone"
    );
    node.run_pod("later")?.start_idle("c")?.exec(&["true"])?;
    node.finish()
}
