//! Ends: of daemons, supervisors and pods.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::{Container, Pod, eventually, log};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{
    HANDLER, NETWORK, PATIENCE, Shared, container_config, idle, pod_config, run, supervisor,
};
use crate::with_drupe;

#[test]
fn the_daemon_may_die_while_it_runs_writes_and_ends() -> Result<()> {
    with_drupe(|node| {
        let pod = run(node, "survivor", NETWORK)?;
        let count = "n=0; while :; do echo $n; n=$((n+1)); sleep 0.1; done";
        let counter = container_config(&pod, "counter", &["sh", "-c", count], NETWORK);
        let counter = pod.start_with(counter)?;
        let created = pod.create(container_config(&pod, "late", &["echo", "late"], NETWORK))?;
        let gate = node.dir.join("gate");
        fs::create_dir(&gate)?;
        let wait = "while [ ! -e /gate/open ]; do sleep 0.05; done; echo bye; exit 9";
        let mut config = container_config(&pod, "ending", &["sh", "-c", wait], NETWORK);
        config.mounts = vec![Mount {
            container_path: "/gate".to_owned(),
            host_path: gate.display().to_string(),
            ..Default::default()
        }];
        let ending = pod.start_with(config)?;
        let (pod_before, counter_before) = (pod.status()?, counter.status()?);

        node.kill_server()?;
        fs::write(gate.join("open"), "")?;
        let before = counter.stdout()?.lines().count();
        eventually("output while the daemon is dead", PATIENCE, || {
            let now = counter.stdout()?.lines().count();
            ensure!(now > before + 10, "{now} lines");
            ensure!(ending.stdout()? == "bye\n", "it has not ended");
            Ok::<_, anyhow::Error>(())
        })?;
        node.start_server()?;

        assert_eq!(pod.status()?, pod_before);
        assert_eq!(counter.status()?, counter_before);
        let status = ending.wait_exit()?;
        assert_eq!((status.exit_code, status.reason.as_str()), (9, "Error"));
        created.start()?;
        assert_eq!(created.wait_exit()?.exit_code, 0);
        assert_eq!(counter.exec(&["echo", "still here"])?, "still here");
        // Its log is rotated as any other.
        let rotated = counter.log.with_extension("1");
        fs::rename(&counter.log, &rotated)?;
        node.cri()?
            .reopen_container_log(ReopenContainerLogRequest {
                container_id: counter.id.clone(),
            })?;
        eventually("lines in the new log", PATIENCE, || {
            ensure!(!counter.stdout()?.is_empty(), "none yet");
            Ok::<_, anyhow::Error>(())
        })?;
        counter.stop(0)?;
        let mut records = log::read(&rotated)?;
        records.extend(log::read(&counter.log)?);
        let written = log::written(&records, log::Stream::Stdout);
        let written = String::from_utf8(written)?;
        let lines = written.lines().count();
        let expected: String = (0..lines).map(|n| format!("{n}\n")).collect();
        ensure!(written == expected, "a line was lost or doubled");
        idle(&pod, "after", NETWORK)?.exec(&["true"]).map(drop)
    })
}

#[test]
fn without_its_supervisor_a_pod_is_not_ready_and_runs_nothing() -> Result<()> {
    with_drupe(|node| {
        let end = |pid: u32| -> Result<()> {
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL).context("kill")
        };
        let over = |pod: &Pod, container: &Container| {
            eventually("the pod to be over", PATIENCE, || {
                ensure!(
                    pod.status()?.state() == PodSandboxState::SandboxNotready,
                    "it is ready"
                );
                ensure!(
                    container.status()?.state() == ContainerState::ContainerExited,
                    "its container runs"
                );
                ensure!(node.pod_processes()?.is_empty(), "processes are left");
                Ok::<_, anyhow::Error>(())
            })
        };
        let pod = run(node, "orphaned", NETWORK)?;
        let container = idle(&pod, "c", NETWORK)?;
        end(supervisor(node)?)?;
        over(&pod, &container)?;
        let told = node.crictl_ok(&["inspectp", &pod.id])?;
        ensure!(told.contains("supervisor ended"), "{told}");
        pod.stop()?;
        pod.remove()?;
        node.assert_no_pod_left()?;

        // The same while nobody looks.
        let pod = run(node, "unseen", NETWORK)?;
        let container = idle(&pod, "c", NETWORK)?;
        let pid = supervisor(node)?;
        node.kill_server()?;
        end(pid)?;
        node.start_server()?;
        over(&pod, &container)?;
        ensure!(container.status()?.exit_code != 0, "it ended with 0");
        pod.stop()?;
        pod.remove()?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_daemon_that_dies_during_the_start_leaves_nothing() -> Result<()> {
    with_drupe(|node| {
        for delay in [0, 20, 40, 80, 120, 160] {
            let config = pod_config(node, "cut-off", Shared::default());
            fs::create_dir_all(&config.log_directory)?;
            let cri = node.cri()?;
            let request = RunPodSandboxRequest {
                config: Some(config),
                runtime_handler: HANDLER.to_owned(),
            };
            let start = std::thread::spawn(move || cri.run_pod_sandbox(request).is_ok());
            std::thread::sleep(Duration::from_millis(delay));
            node.kill_server()?;
            let _answered = start.join();
            node.start_server()?;
            eventually("the half-made pod to be gone", PATIENCE, || {
                node.remove_all_pods()?;
                node.assert_no_pod_left()
            })?;
        }
        Ok(())
    })
}

#[test]
fn nothing_is_left_of_stopped_and_removed_pods() -> Result<()> {
    with_drupe(|node| {
        let pod = run(node, "tidy", NETWORK)?;
        let running = idle(&pod, "running", NETWORK)?;
        running.exec(&["sh", "-c", "echo x > /file"])?;
        let ended = pod.start_with(container_config(&pod, "ended", &["true"], NETWORK))?;
        ended.wait_exit()?;
        ended.remove()?;
        let never = pod.create(container_config(&pod, "never", &["true"], NETWORK))?;
        never.remove()?;
        pod.stop()?;
        node.assert_no_running_pod_left()?;
        pod.stop()?;
        assert_eq!(pod.status()?.state(), PodSandboxState::SandboxNotready);
        assert_eq!(running.status()?.state(), ContainerState::ContainerExited);
        pod.remove()?;
        node.assert_no_pod_left()
    })
}
