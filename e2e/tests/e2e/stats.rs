//! What containers and pods use, as the kubelet asks for it.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::eventually;

use crate::{shares_the_hosts_kernel, with_drupe, with_node};

#[test]
fn a_containers_work_shows_in_its_statistics() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("busy")?;
        let script = "dd if=/dev/zero of=/dev/shm/held bs=1M count=20 2> /dev/null; dd if=/dev/zero of=/written bs=1M count=8 2> /dev/null; sync; while :; do :; done";
        let busy = pod.start("busy", &["sh", "-c", script])?;
        let idle = pod.start_idle("idle")?;
        let (second, mebibyte) = (1_000_000_000, 1 << 20);
        eventually(
            "the busy container to have used 1 s of CPU",
            Duration::from_secs(30),
            || {
                let stats = busy.stats()?;
                let cpu = stats
                    .cpu
                    .as_ref()
                    .and_then(|cpu| cpu.usage_core_nano_seconds)
                    .context("no CPU usage")?
                    .value;
                ensure!(cpu > second, "{cpu} ns");
                Ok::<_, anyhow::Error>(())
            },
        )?;
        let stats = busy.stats()?;
        let memory = stats.memory.context("no memory statistics")?;
        let working_set = memory.working_set_bytes.context("no working set")?.value;
        ensure!(
            working_set > 15 * mebibyte,
            "working set of {working_set} bytes"
        );
        let attributes = stats.attributes.context("no attributes")?;
        assert_eq!(attributes.id, busy.id);
        assert_eq!(attributes.metadata.unwrap_or_default().name, "busy");
        let idle_cpu = idle
            .stats()?
            .cpu
            .and_then(|cpu| cpu.usage_core_nano_seconds)
            .context("no CPU usage")?
            .value;
        ensure!(idle_cpu < second, "the idle container used {idle_cpu} ns");
        if !shares_the_hosts_kernel(node) {
            // containerd looks at disk usage every ten seconds only.
            let disk = stats
                .writable_layer
                .and_then(|layer| layer.used_bytes)
                .context("no disk usage")?
                .value;
            ensure!(disk > 7 * mebibyte, "{disk} bytes on disk");
        }

        let list = node
            .cri()?
            .list_container_stats(ListContainerStatsRequest {
                filter: Some(ContainerStatsFilter {
                    pod_sandbox_id: pod.id.clone(),
                    ..Default::default()
                }),
            })?;
        assert_eq!(list.stats.len(), 2);
        let of = |filter: ContainerStatsFilter| -> Result<Vec<String>> {
            let request = ListContainerStatsRequest {
                filter: Some(filter),
            };
            let stats = node.cri()?.list_container_stats(request)?.stats;
            let ids = stats.into_iter().filter_map(|of| of.attributes);
            Ok(ids.map(|attributes| attributes.id).collect())
        };
        let by_id = ContainerStatsFilter {
            id: busy.id.clone(),
            ..Default::default()
        };
        assert_eq!(of(by_id)?, [busy.id.as_str()]);
        let by_label = |value: &str| ContainerStatsFilter {
            label_selector: [("container".to_owned(), value.to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(of(by_label("idle"))?, [idle.id.as_str()]);
        assert_eq!(of(by_label("neither"))?, [""; 0]);

        if !shares_the_hosts_kernel(node) {
            // What containers write is on the node's disk, and told there too.
            let info = node.cri()?.image_fs_info(ImageFsInfoRequest {})?;
            let disks = info.container_filesystems;
            let used: u64 = disks
                .iter()
                .filter_map(|fs| fs.used_bytes.as_ref())
                .map(|used| used.value)
                .sum();
            ensure!(used > 7 * mebibyte, "{disks:?}");
        }
        Ok(())
    })
}

#[test]
fn a_pods_statistics_sum_up_the_pod() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("summed")?;
        pod.start_idle("c")?;
        let request = PodSandboxStatsRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        let stats = node
            .cri()?
            .pod_sandbox_stats(request)?
            .stats
            .context("no stats")?;
        assert_eq!(stats.attributes.context("attributes")?.id, pod.id);
        let linux = stats.linux.context("no linux statistics")?;
        assert_eq!(linux.containers.len(), 1);
        ensure!(
            linux
                .cpu
                .and_then(|cpu| cpu.usage_core_nano_seconds)
                .context("CPU")?
                .value
                > 0
        );
        ensure!(
            linux
                .memory
                .and_then(|memory| memory.working_set_bytes)
                .context("memory")?
                .value
                > 0
        );
        let network = linux
            .network
            .and_then(|network| network.default_interface)
            .context("network")?;
        assert_eq!(network.name, "eth0");
        let list = node
            .cri()?
            .list_pod_sandbox_stats(ListPodSandboxStatsRequest::default())?;
        assert_eq!(list.stats.len(), 1);
        let other = node.run_pod("other")?;
        let of = |filter: PodSandboxStatsFilter| -> Result<Vec<String>> {
            let request = ListPodSandboxStatsRequest {
                filter: Some(filter),
            };
            let stats = node.cri()?.list_pod_sandbox_stats(request)?.stats;
            let ids = stats.into_iter().filter_map(|of| of.attributes);
            Ok(ids.map(|attributes| attributes.id).collect())
        };
        let by_id = PodSandboxStatsFilter {
            id: pod.id.clone(),
            ..Default::default()
        };
        assert_eq!(of(by_id)?, [pod.id.as_str()]);
        let by_label = PodSandboxStatsFilter {
            label_selector: [("app".to_owned(), "other".to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(of(by_label)?, [other.id.as_str()]);
        Ok(())
    })
}

#[test]
fn pressure_shows_who_waits_for_a_cpu() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("pressed")?;
        let mut config = pod.container_config("waits", &["sh", "-c", "while :; do :; done"]);
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 10_000,
            ..Default::default()
        });
        let waits = pod.start_with(config)?;
        let calm = pod.start_idle("calm")?;
        let pressure = |stats: &ContainerStats| -> Result<u64> {
            let psi = stats.cpu.as_ref().and_then(|cpu| cpu.psi.as_ref());
            let some = psi.and_then(|psi| psi.some.as_ref());
            Ok(some.context("no pressure")?.total)
        };
        let second = 1_000_000_000;
        eventually("a second of waiting", Duration::from_secs(60), || {
            let total = pressure(&waits.stats()?)?;
            ensure!(total > second, "{total} ns");
            Ok::<_, anyhow::Error>(())
        })?;
        ensure!(pressure(&calm.stats()?)? < second);
        let stats = waits.stats()?;
        ensure!(stats.memory.is_some_and(|memory| memory.psi.is_some()));
        let io = stats.io.context("no pressure of disks")?;
        ensure!(io.timestamp > 0 && io.psi.is_some());
        let request = PodSandboxStatsRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        let of_pod = node.cri()?.pod_sandbox_stats(request)?.stats;
        let linux = of_pod.and_then(|stats| stats.linux).context("no figures")?;
        let psi = linux.cpu.and_then(|cpu| cpu.psi).context("no pressure")?;
        ensure!(psi.some.is_some_and(|some| some.total > second));
        ensure!(linux.io.is_some());
        Ok(())
    })
}

#[test]
fn what_a_container_deletes_is_given_back_to_the_node() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("tidy")?;
        let container = pod.start_idle("c")?;
        let on_node = || -> Result<u64> {
            let mut blocks = 0;
            for entry in std::fs::read_dir(node.root().join("scratch"))? {
                let entry = entry?;
                if pod.id.starts_with(
                    entry
                        .file_name()
                        .to_string_lossy()
                        .trim_end_matches(".ext4"),
                ) {
                    blocks += entry.metadata()?.blocks();
                }
            }
            Ok(blocks * 512)
        };
        let mebibyte = 1 << 20;
        let write = "dd if=/dev/urandom of=/large bs=1M count=200 2> /dev/null; sync";
        container.exec(&["sh", "-c", write])?;
        let written = on_node()?;
        ensure!(written > 200 * mebibyte, "{written} bytes");
        container.exec(&["sh", "-c", "rm /large; sync"])?;
        // The agent looks every half a minute.
        eventually("blocks to be given back", Duration::from_secs(90), || {
            let left = on_node()?;
            ensure!(left < 60 * mebibyte, "{left} of {written} bytes");
            Ok::<_, anyhow::Error>(())
        })?;
        let layer = container.stats()?.writable_layer.context("no disk usage")?;
        let used = layer.used_bytes.context("no disk usage")?.value;
        ensure!(used < mebibyte, "{used} bytes");
        Ok(())
    })
}
