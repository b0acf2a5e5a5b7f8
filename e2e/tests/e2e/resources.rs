//! Limits that change while containers run, and the guest's memory with them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::bench::pss;
use e2e::{Container, Node, Pod, eventually};
use serde_json::Value;
use tonic::Code;

use crate::{on_drupe, refused, with_drupe, with_node};

const MIB: i64 = 1 << 20;

fn memory(mib: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: mib * MIB,
        ..Default::default()
    }
}

fn start_with(pod: &Pod, name: &str, resources: LinuxContainerResources) -> Result<Container> {
    let mut config = pod.container_config(name, e2e::pod::IDLE);
    config.linux.get_or_insert_default().resources = Some(resources);
    pod.start_with(config)
}

/// What its status says that it may use.
fn stated(container: &Container) -> Result<LinuxContainerResources> {
    let resources = container.status()?.resources.and_then(|r| r.linux);
    resources.context("no resources in the status")
}

/// A limit in the guest, as the container sees it.
fn in_guest(container: &Container, file: &str) -> Result<String> {
    container.exec(&["cat", &format!("/sys/fs/cgroup/{file}")])
}

#[test]
fn a_raised_memory_limit_lets_live_what_would_have_been_killed() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("raised")?;
        let hold = "dd if=/dev/zero of=/dev/shm/held bs=1M count=48";
        let killed = start_with(&pod, "killed", memory(32))?;
        // The whole container goes, the command with it.
        drop(killed.exec_sync(&["sh", "-c", hold], 0));
        assert_eq!(killed.wait_exit()?.reason, "OOMKilled");

        let lives = start_with(&pod, "lives", memory(32))?;
        lives.exec(&["rm", "-f", "/dev/shm/held"])?;
        lives.update(memory(96))?;
        assert_eq!(stated(&lives)?.memory_limit_in_bytes, 96 * MIB);
        assert_eq!(in_guest(&lives, "memory.max")?, (96 * MIB).to_string());
        lives.exec(&["sh", "-c", hold])?;

        // What it holds does not fit: nothing changes and nobody is killed.
        refused(
            lives.update(memory(16)),
            Code::FailedPrecondition,
            &["16777216", "killed"],
        )?;
        assert_eq!(stated(&lives)?.memory_limit_in_bytes, 96 * MIB);
        assert_eq!(in_guest(&lives, "memory.max")?, (96 * MIB).to_string());
        lives.exec(&["rm", "/dev/shm/held"])?;
        lives.update(memory(16))?;
        assert_eq!(stated(&lives)?.memory_limit_in_bytes, 16 * MIB);
        assert_eq!(in_guest(&lives, "memory.max")?, (16 * MIB).to_string());
        // Files in memory are no reason to refuse: they are dropped.
        lives.update(memory(64))?;
        lives.exec(&["sh", "-c", "dd if=/dev/zero of=/file bs=1M count=40; sync"])?;
        lives.update(memory(16))?;
        lives.exec(&["true"]).map(drop)
    })
}

#[test]
fn an_update_changes_what_it_names_and_a_new_daemon_knows_it() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("named")?;
        let container = start_with(
            &pod,
            "c",
            LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 50_000,
                cpu_shares: 1024,
                ..memory(64)
            },
        )?;
        assert_eq!(in_guest(&container, "cpu.max")?, "50000 100000");
        assert_eq!(in_guest(&container, "cpu.weight")?, "100");
        container.update(LinuxContainerResources {
            cpu_quota: 20_000,
            unified: [("pids.max".to_owned(), "77".to_owned())].into(),
            ..Default::default()
        })?;
        assert_eq!(in_guest(&container, "cpu.max")?, "20000 100000");
        assert_eq!(in_guest(&container, "cpu.weight")?, "100");
        assert_eq!(in_guest(&container, "memory.max")?, (64 * MIB).to_string());
        assert_eq!(in_guest(&container, "pids.max")?, "77");
        container.update(LinuxContainerResources {
            cpu_shares: 2,
            cpu_period: 50_000,
            cpu_quota: -1,
            memory_limit_in_bytes: -1,
            oom_score_adj: 500,
            cpuset_cpus: "0".to_owned(),
            ..Default::default()
        })?;
        assert_eq!(in_guest(&container, "cpu.max")?, "max 50000");
        assert_eq!(in_guest(&container, "cpu.weight")?, "1");
        assert_eq!(in_guest(&container, "memory.max")?, "max");
        let score = ["cat", "/proc/1/oom_score_adj", "/proc/self/oom_score_adj"];
        assert_eq!(container.exec(&score)?, "500\n500");
        let before = stated(&container)?;
        assert_eq!((before.cpu_quota, before.memory_limit_in_bytes), (0, 0));
        assert_eq!((before.cpu_shares, before.cpu_period), (2, 50_000));
        assert_eq!(before.cpuset_cpus, "0");
        assert_eq!(before.unified["pids.max"], "77");

        node.kill_server()?;
        node.start_server()?;
        assert_eq!(stated(&container)?, before);
        let bytes = (48 * MIB).to_string();
        node.crictl_ok(&["update", "--memory", &bytes, &container.id])?;
        assert_eq!(in_guest(&container, "memory.max")?, bytes);
        assert_eq!(in_guest(&container, "cpu.max")?, "max 50000");
        Ok(())
    })
}

#[test]
fn an_update_is_made_whole_or_not_at_all() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("whole")?;
        let container = start_with(&pod, "c", memory(64))?;
        let before = stated(&container)?;
        let unified = |file: &str, value: &str| LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 30_000,
            unified: [(file.to_owned(), value.to_owned())].into(),
            ..memory(32)
        };
        for (resources, code, named) in [
            (
                unified("none.max", "1"),
                Code::FailedPrecondition,
                "none.max",
            ),
            (
                unified("pids.max", "many"),
                Code::InvalidArgument,
                "pids.max",
            ),
            (
                unified("cgroup.kill", "1"),
                Code::InvalidArgument,
                "cgroup.kill",
            ),
        ] {
            refused(container.update(resources), code, &[named])?;
            assert_eq!(stated(&container)?, before);
            assert_eq!(in_guest(&container, "memory.max")?, (64 * MIB).to_string());
            assert_eq!(in_guest(&container, "cpu.max")?, "max 100000");
        }
        let negative = LinuxContainerResources {
            cpu_shares: -5,
            ..Default::default()
        };
        refused(
            container.update(negative),
            Code::InvalidArgument,
            &["linux.cpu_shares"],
        )
        .map(drop)
    })
}

/// What the kubelet sends for every container of a node with cgroup v2; without
/// `memory.oom.group` where its `singleProcessOOMKill` is set.
fn from_the_kubelet(mib: i64, single_process: bool) -> LinuxContainerResources {
    let mut unified = vec![("memory.swap.max", "0")];
    if !single_process {
        unified.push(("memory.oom.group", "1"));
    }
    let pairs = unified.into_iter();
    LinuxContainerResources {
        unified: pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
        ..memory(mib)
    }
}

#[test]
fn the_kubelets_words_about_swap_and_oom_hold() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("unified")?;
        for (name, resources, group) in [
            ("whole", from_the_kubelet(48, false), "1"),
            ("single", from_the_kubelet(48, true), "0"),
            ("silent", memory(48), "1"),
        ] {
            let container = start_with(&pod, name, resources.clone())?;
            assert_eq!(in_guest(&container, "memory.oom.group")?, group, "{name}");
            assert_eq!(stated(&container)?.unified, resources.unified, "{name}");
            // A resize in place says it all again.
            container.update(LinuxContainerResources {
                memory_limit_in_bytes: 64 * MIB,
                ..resources
            })?;
            assert_eq!(in_guest(&container, "memory.max")?, (64 * MIB).to_string());
            assert_eq!(in_guest(&container, "memory.oom.group")?, group, "{name}");
        }
        let told = start_with(&pod, "told", from_the_kubelet(48, true))?;
        told.update(from_the_kubelet(48, false))?;
        assert_eq!(in_guest(&told, "memory.oom.group")?, "1");
        Ok(())
    })
}

#[test]
fn only_the_process_that_is_out_of_memory_ends_if_the_kubelet_says_so() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("out-of-memory")?;
        let hungry = |name: &str, single_process| {
            let script = "tail /dev/zero; echo its end: $?; exec sleep 1000";
            let mut config = pod.container_config(name, &["sh", "-c", script]);
            let resources = from_the_kubelet(32, single_process);
            config.linux.get_or_insert_default().resources = Some(resources);
            pod.start_with(config)
        };
        let single = hungry("single", true)?;
        eventually("the process to end", Duration::from_secs(30), || {
            let said = single.stdout()?;
            ensure!(said == "its end: 137\n", "{said:?}");
            Ok::<_, anyhow::Error>(())
        })?;
        assert_eq!(single.status()?.state(), ContainerState::ContainerRunning);
        let ended = hungry("whole", false)?.wait_exit()?;
        assert_eq!((ended.reason.as_str(), ended.exit_code), ("OOMKilled", 137));
        Ok(())
    })
}

#[test]
fn a_container_that_does_not_run_is_updated_on_record() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("record")?;
        let mut config = pod.container_config("created", e2e::pod::IDLE);
        config.linux.get_or_insert_default().resources = Some(memory(32));
        let created = pod.create(config)?;
        created.update(memory(48))?;
        created.start()?;
        let ended = pod.start("ended", &["true"])?;
        ended.wait_exit()?;
        ended.update(memory(48))?;
        let request = UpdateContainerResourcesRequest {
            container_id: "0123456789abcdef".repeat(4),
            linux: Some(memory(48)),
            ..Default::default()
        };
        let unknown = node.cri()?.update_container_resources(request);
        ensure!(unknown.is_err_and(|status| status.code() == Code::NotFound));
        if !crate::shares_the_hosts_kernel(node) {
            for container in [&created, &ended] {
                assert_eq!(stated(container)?.memory_limit_in_bytes, 48 * MIB);
            }
            assert_eq!(in_guest(&created, "memory.max")?, (48 * MIB).to_string());
        }
        Ok(())
    })
}

/// A pod's guest, as its node and a container in it see it.
struct Guest<'a> {
    node: &'a Node,
    pod: &'a Pod,
    inside: &'a Container,
}

impl Guest<'_> {
    /// What the daemon says that it is to have.
    fn mib(&self) -> Result<i64> {
        let text = self.node.crictl_ok(&["inspectp", &self.pod.id])?;
        let inspected: Value = serde_json::from_str(&text)?;
        let mib = &inspected["info"]["memoryMiB"];
        mib.as_i64().with_context(|| format!("memoryMiB is {mib}"))
    }

    fn available_mib(&self) -> Result<i64> {
        let text = self.inside.exec(&["cat", "/proc/meminfo"])?;
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(kib.context(text.clone())?.parse::<i64>()? / 1024)
    }

    fn becomes_available(&self, at_least: i64, below: i64) -> Result<()> {
        let what = format!("{at_least} to {below} MiB to be available");
        eventually(&what, Duration::from_secs(30), || {
            let now = self.available_mib()?;
            ensure!((at_least..below).contains(&now), "{now} MiB");
            Ok::<_, anyhow::Error>(())
        })
    }
}

#[test]
fn a_pods_memory_follows_its_limit_down_and_up_within_the_headroom() -> Result<()> {
    let node = Node::builder()
        .config(|config| config["runtimes"]["microvm"]["memory_headroom_mib"] = 128.into())
        .start()?;
    node.pull_busybox()?;
    on_drupe(node, |node| {
        let mut config = node.pod_config("elastic");
        config.linux.get_or_insert_default().resources = Some(memory(128));
        let pod = node.run_pod_with(config)?;
        let inside = pod.start_idle("inside")?;
        let guest = Guest {
            node,
            pod: &pod,
            inside: &inside,
        };
        // 64 MiB are the guest's own; its machine has 128 MiB more.
        assert_eq!(guest.mib()?, 192);
        guest.becomes_available(64, 192)?;
        inside.exec(&["sh", "-c", "dd if=/dev/zero of=/file bs=1M count=110; sync"])?;
        let full = pss(node)?;
        ensure!(full > 130 << 20, "only {} MiB in use", full >> 20);

        // Down: the node gets it.
        pod.update(memory(16))?;
        assert_eq!(guest.mib()?, 80);
        guest.becomes_available(0, 80)?;
        eventually("the node to have it", Duration::from_secs(30), || {
            let now = pss(node)?;
            ensure!(now < 120 << 20, "{} MiB in use", now >> 20);
            Ok::<_, anyhow::Error>(())
        })?;
        node.kill_server()?;
        node.start_server()?;
        assert_eq!(guest.mib()?, 80);

        // Up: beyond what it started with.
        pod.update(memory(256))?;
        assert_eq!(guest.mib()?, 320);
        guest.becomes_available(200, 320)?;

        // Beyond the machine: refused, and nothing changes.
        let parts = ["memory_headroom_mib", "320 MiB", "576 MiB"];
        refused(pod.update(memory(512)), Code::FailedPrecondition, &parts)?;
        assert_eq!(guest.mib()?, 320);
        guest.becomes_available(200, 320)?;

        // A container that is to have more than the guest makes it grow.
        pod.update(memory(64))?;
        let grows = start_with(&pod, "grows", memory(64))?;
        assert_eq!(guest.mib()?, 128);
        grows.update(memory(200))?;
        assert_eq!(guest.mib()?, 264);
        guest.becomes_available(150, 264)?;
        refused(
            grows.update(memory(400)),
            Code::FailedPrecondition,
            &["memory_headroom_mib"],
        )?;
        assert_eq!(stated(&grows)?.memory_limit_in_bytes, 200 * MIB);
        assert_eq!(guest.mib()?, 264);
        Ok(())
    })
}

#[test]
fn a_pod_without_headroom_shrinks_and_grows_back_and_no_further() -> Result<()> {
    with_drupe(|node| {
        let mut config = node.pod_config("rigid");
        config.linux.get_or_insert_default().resources = Some(memory(128));
        let pod = node.run_pod_with(config)?;
        let inside = pod.start_idle("inside")?;
        let guest = Guest {
            node,
            pod: &pod,
            inside: &inside,
        };
        let before = guest.available_mib()?;
        pod.update(memory(64))?;
        assert_eq!(guest.mib()?, 128);
        guest.becomes_available(0, before - 40)?;
        pod.update(memory(128))?;
        guest.becomes_available(before - 20, 192)?;
        refused(
            pod.update(memory(129)),
            Code::FailedPrecondition,
            &["193 MiB", "192 MiB"],
        )?;
        // More CPU is the business of limits; the guest has the CPUs it has.
        pod.update(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 400_000,
            ..memory(128)
        })?;
        assert_eq!(guest.mib()?, 192);
        let unknown = UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: "0123456789abcdef".repeat(4),
            ..Default::default()
        };
        let unknown = node.cri()?.update_pod_sandbox_resources(unknown);
        refused(unknown, Code::NotFound, &["0123456789abcdef"])?;
        pod.stop()?;
        pod.update(memory(64)).map_err(Into::into)
    })
}
