//! A pod's virtual machine: as many CPUs as the pod asks for, and an end of its
//! own making that is told as what it was.

use std::time::Duration;

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::{Container, Node, Pod, eventually};

use crate::with_drupe;

#[test]
fn a_pod_that_asks_for_four_cpus_runs_on_four() -> Result<()> {
    with_drupe(|node| {
        let host = std::thread::available_parallelism()?.get();
        let mut config = node.pod_config("wide");
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 400_000,
            memory_limit_in_bytes: 256 << 20,
            ..Default::default()
        });
        let container = node.run_pod_with(config)?.start_idle("c")?;
        // A machine is not wider than its node.
        let cpus = host.min(4);
        let online = container.exec(&["cat", "/sys/devices/system/cpu/online"]);
        let count = container.exec(&["grep", "-c", "^processor", "/proc/cpuinfo"])?;
        assert_eq!(count, cpus.to_string(), "online: {online:?}");
        // Each does work: field 39 of a process's stat is the CPU it is on.
        for cpu in 0..cpus {
            let mask = format!("{:x}", 1 << cpu);
            let script = "awk '{ print $39 }' /proc/self/stat";
            let on = container.exec(&["taskset", &mask, "sh", "-c", script])?;
            assert_eq!(on, cpu.to_string());
        }
        let sums = container.exec(&[
            "sh",
            "-c",
            "for n in 1 2 3 4; do head -c 4000000 /dev/zero | sha256sum > /sum$n & done; wait; cat /sum1 /sum2 /sum3 /sum4 | uniq -c",
        ])?;
        ensure!(sums.trim_start().starts_with("4 "), "{sums}");
        Ok(())
    })
}

#[test]
fn a_guest_that_is_restarted_or_switched_off_from_inside_ends_its_pod() -> Result<()> {
    with_drupe(|node| {
        for command in ["reboot", "poweroff"] {
            let pod = node.run_pod(command)?;
            let container = pod.start_idle("idle")?;
            let outside = privileged(&pod, "outside")?;
            // In a container's own process namespace the call would end only
            // the container. What the kernel starts for a core dump is outside.
            let script = format!(
                "echo '|/proc/%P/root/bin/busybox {command} -f' > /proc/sys/kernel/core_pattern; sh -c 'kill -SEGV $$'"
            );
            // The machine may end before the command does.
            let answer = outside.exec_sync(&["sh", "-c", &script], 20);
            await_end(&pod, &container).map_err(|error| error.context(format!("{answer:?}")))?;
            assert_ended(node, &pod, &container)?;
        }
        Ok(())
    })
}

#[test]
fn a_guest_that_panics_ends_its_pod_with_its_last_words() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("panicky")?;
        let container = pod.start_idle("idle")?;
        // 2: panic whoever's memory it is that ran out.
        privileged(&pod, "tuner")?.exec(&["sh", "-c", "echo 2 > /proc/sys/vm/panic_on_oom"])?;
        let mut hungry = pod.container_config("hungry", &["tail", "/dev/zero"]);
        hungry.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            ..Default::default()
        });
        pod.start_with(hungry)?;
        let status = await_end(&pod, &container)?;
        ensure!(
            status.message.contains("kernel panic: Out of memory"),
            "the container's end tells of {:?}",
            status.message
        );
        assert_ended(node, &pod, &container)
    })
}

/// A container that may do to its guest what root may.
fn privileged(pod: &Pod, name: &str) -> Result<Container> {
    let mut config = pod.container_config(name, e2e::pod::IDLE);
    e2e::pod::security(&mut config).privileged = true;
    pod.start_with(config)
}

/// Waits until pod and container are over, by themselves.
pub fn await_end(pod: &Pod, container: &Container) -> Result<ContainerStatus> {
    eventually("the pod to be not ready", Duration::from_secs(10), || {
        let state = pod.status()?.state();
        ensure!(state == PodSandboxState::SandboxNotready, "it is {state:?}");
        let status = container.status()?;
        ensure!(
            status.state() == ContainerState::ContainerExited,
            "its container is {:?}",
            status.state()
        );
        Ok::<_, anyhow::Error>(status)
    })
}

/// A pod whose machine has ended holds nothing once it is removed.
pub fn assert_ended(node: &Node, pod: &Pod, container: &Container) -> Result<()> {
    let status = container.status()?;
    ensure!(status.exit_code != 0, "a lost container ended with 0");
    ensure!(!status.message.is_empty(), "no word of why it ended");
    ensure!(
        pod.start_idle("late").is_err(),
        "a container started in a pod without a machine"
    );
    pod.stop()?;
    pod.remove()?;
    node.assert_no_pod_left()
}
