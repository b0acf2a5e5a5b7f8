//! Limits and statistics.

use std::fs;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::Server;
use e2e::pod::IDLE;

use super::{NETWORK, container_config, pod_config, run, supervisor};
use crate::{with_drupe, with_node};

#[test]
fn limits_hold_and_a_container_beyond_its_memory_is_oom_killed() -> Result<()> {
    with_node(|node| {
        let _other_tests_look_later = e2e::cgroup::lock_parent_of_daemon();
        // Below the node's own group, which has processes in it, version 2
        // limits nothing.
        let mut config = pod_config(node, "limited", NETWORK);
        config.linux.get_or_insert_default().cgroup_parent = String::new();
        let pod = node.run_pod_with(config)?;
        let limit = 48 << 20;
        let mut config = container_config(&pod, "hungry", &["tail", "/dev/zero"], NETWORK);
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: limit,
            ..Default::default()
        });
        let status = pod.start_with(config)?.wait_exit()?;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (137, "OOMKilled")
        );

        let mut config = container_config(&pod, "busy", IDLE, NETWORK);
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: limit,
            cpu_period: 100_000,
            cpu_quota: 20_000,
            ..Default::default()
        });
        let busy = pod.start_with(config)?;
        let work = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; head -c 3000000 /dev/zero > /f; sync";
        busy.exec(&["sh", "-c", work])?;
        let stats = busy.stats()?;
        let value = |value: Option<UInt64Value>| value.map_or(0, |v| v.value);
        let cpu = value(stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds));
        ensure!(cpu > 1_000_000, "{cpu} ns of CPU");
        let memory = stats.memory.context("no memory")?;
        let used = value(memory.working_set_bytes);
        ensure!(used > 0 && used < limit as u64, "{used} bytes of memory");
        // containerd 1.6 gives no more.
        if node.server == Server::Drupe {
            ensure!(value(memory.available_bytes) < limit as u64, "{memory:?}");
            let layer = stats.writable_layer.context("no writable layer")?;
            ensure!(value(layer.used_bytes) >= 3_000_000, "{layer:?}");
        }
        pod.stop()?;
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn limits_change_before_the_start_and_after_it() -> Result<()> {
    with_drupe(|node| {
        let pod = run(node, "changing", NETWORK)?;
        let container = pod.create(container_config(&pod, "c", IDLE, NETWORK))?;
        let update = |linux: LinuxContainerResources| {
            node.cri()?
                .update_container_resources(UpdateContainerResourcesRequest {
                    container_id: container.id.clone(),
                    linux: Some(linux),
                    ..Default::default()
                })
                .context("update")
        };
        let score = || container.exec(&["cat", "/proc/1/oom_score_adj"]);
        update(LinuxContainerResources {
            oom_score_adj: 700,
            cpuset_cpus: "0".to_owned(),
            ..Default::default()
        })?;
        container.start()?;
        assert_eq!(score()?, "700");
        let allowed = ["sh", "-c", "grep Cpus_allowed_list /proc/1/status"];
        ensure!(container.exec(&allowed)?.ends_with("\t0"), "CPUs");
        update(LinuxContainerResources {
            oom_score_adj: 800,
            ..Default::default()
        })?;
        assert_eq!(score()?, "800");
        // A command has it as soon as the runtime has made it.
        let wait = "while [ $(cat /proc/$$/oom_score_adj) != 800 ]; do :; done";
        container.exec(&["sh", "-c", wait])?;
        ensure!(
            container.exec(&allowed)?.ends_with("\t0"),
            "CPUs were given"
        );
        Ok(())
    })
}

#[test]
fn the_oom_killer_takes_the_supervisor_last_and_containers_as_they_asked() -> Result<()> {
    with_drupe(|node| {
        let pod = run(node, "scored", NETWORK)?;
        let mut config = container_config(&pod, "c", IDLE, NETWORK);
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            oom_score_adj: 500,
            ..Default::default()
        });
        let container = pod.start_with(config)?;
        let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", supervisor(node)?))?;
        // Lowering it takes CAP_SYS_RESOURCE, which the daemon may lack here.
        let own = fs::read_to_string("/proc/self/oom_score_adj")?;
        let may = fs::read_to_string("/proc/self/status")?;
        let may = may.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let may = u64::from_str_radix(may.context("capabilities")?.trim(), 16)?;
        let lowest = if may & (1 << 24) == 0 {
            own.trim()
        } else {
            "-998"
        };
        assert_eq!(score.trim(), lowest);
        let own = "cat /proc/1/oom_score_adj /proc/self/oom_score_adj";
        assert_eq!(container.exec(&["sh", "-c", own])?, "500\n500");
        Ok(())
    })
}
