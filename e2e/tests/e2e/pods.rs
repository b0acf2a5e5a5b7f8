//! A pod has its own kernel, its own network and the names it was given.

use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::eventually;
use tonic::Code;

use crate::{refused, shares_the_hosts_kernel, with_drupe, with_node};

#[test]
fn a_pod_runs_a_kernel_that_is_not_the_hosts() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("kernel")?.start_idle("c")?;
        let host = nix::sys::utsname::uname()?;
        let pod = container.exec(&["uname", "-r"])?;
        let same = pod == host.release().to_string_lossy();
        ensure!(
            same == shares_the_hosts_kernel(node),
            "the pod's kernel is {pod}"
        );
        Ok(())
    })
}

#[test]
fn a_pod_has_the_host_name_and_dns_it_was_given() -> Result<()> {
    with_node(|node| {
        let mut config = node.pod_config("named");
        config.hostname = "wanted-name".to_owned();
        config.dns_config = Some(DnsConfig {
            servers: vec!["10.96.0.10".to_owned()],
            searches: vec![
                "e2e.svc.cluster.local".to_owned(),
                "cluster.local".to_owned(),
            ],
            options: vec!["ndots:5".to_owned()],
        });
        let pod = node.run_pod_with(config)?;
        let container = pod.start_idle("c")?;
        assert_eq!(container.exec(&["hostname"])?, "wanted-name");
        let resolv = container.exec(&["cat", "/etc/resolv.conf"])?;
        for line in [
            "nameserver 10.96.0.10",
            "search e2e.svc.cluster.local cluster.local",
            "options ndots:5",
        ] {
            ensure!(
                resolv.lines().any(|l| l == line),
                "{line:?} is not in {resolv:?}"
            );
        }
        // containerd leaves these two to the kubelet.
        if !shares_the_hosts_kernel(node) {
            assert_eq!(container.exec(&["cat", "/etc/hostname"])?, "wanted-name");
            let hosts = container.exec(&["cat", "/etc/hosts"])?;
            ensure!(
                hosts.contains("127.0.0.1") && hosts.contains("localhost"),
                "{hosts}"
            );
            ensure!(hosts.contains("wanted-name"), "{hosts}");
        }
        Ok(())
    })
}

#[test]
fn pods_are_found_by_id_state_and_label() -> Result<()> {
    with_node(|node| {
        let cri = node.cri()?;
        let mut config = node.pod_config("first");
        config.annotations =
            HashMap::from([("note".to_owned(), "kept, with \"quotes\"".to_owned())]);
        let first = node.run_pod_with(config)?;
        let second = node.run_pod("second")?;
        second.stop()?;

        let status = first.status()?;
        assert_eq!(status.metadata, first.config.metadata);
        assert_eq!(status.labels, first.config.labels);
        assert_eq!(status.annotations, first.config.annotations);
        assert_eq!(status.state(), PodSandboxState::SandboxReady);
        ensure!(
            status.created_at > 1_600_000_000_000_000_000,
            "created_at {}",
            status.created_at
        );

        let find = |filter: PodSandboxFilter| -> Result<Vec<String>> {
            let request = ListPodSandboxRequest {
                filter: Some(filter),
            };
            Ok(cri
                .list_pod_sandbox(request)?
                .items
                .into_iter()
                .map(|pod| pod.id)
                .collect())
        };
        let by_state = |state: PodSandboxState| PodSandboxFilter {
            state: Some(PodSandboxStateValue {
                state: state.into(),
            }),
            ..Default::default()
        };
        assert_eq!(find(PodSandboxFilter::default())?.len(), 2);
        assert_eq!(
            find(PodSandboxFilter {
                id: first.id.clone(),
                ..Default::default()
            })?,
            [first.id.as_str()]
        );
        assert_eq!(
            find(by_state(PodSandboxState::SandboxReady))?,
            [first.id.as_str()]
        );
        assert_eq!(
            find(by_state(PodSandboxState::SandboxNotready))?,
            [second.id.as_str()]
        );
        let label_selector = HashMap::from([("app".to_owned(), "second".to_owned())]);
        assert_eq!(
            find(PodSandboxFilter {
                label_selector,
                ..Default::default()
            })?,
            [second.id.as_str()]
        );
        let label_selector = HashMap::from([("app".to_owned(), "third".to_owned())]);
        ensure!(
            find(PodSandboxFilter {
                label_selector,
                ..Default::default()
            })?
            .is_empty()
        );
        Ok(())
    })
}

#[test]
fn a_stopped_pod_frees_its_resources_and_stays_until_it_is_removed() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("brief")?;
        pod.start_idle("c")?;
        pod.stop()?;
        node.assert_no_running_pod_left()?;
        assert_eq!(pod.status()?.state(), PodSandboxState::SandboxNotready);
        pod.stop().context("a second stop")?;
        pod.remove()?;
        pod.remove().context("a second removal")?;
        if !shares_the_hosts_kernel(node) {
            pod.stop().context("a stop after the removal")?;
        }
        node.assert_no_pod_left()
    })
}

#[test]
fn a_running_pod_can_be_removed_at_once() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("forced")?;
        pod.start_idle("c")?;
        pod.remove()?;
        node.assert_no_pod_left()
    })
}

#[test]
fn containers_see_each_others_processes_only_where_the_pod_asks_for_it() -> Result<()> {
    with_node(|node| {
        let of = |mode: NamespaceMode| {
            Some(NamespaceOption {
                pid: mode.into(),
                ..Default::default()
            })
        };
        let (apart, together) = (of(NamespaceMode::Container), of(NamespaceMode::Pod));
        for (name, of_pod, of_containers, shared) in [
            ("apart", &apart, &apart, false),
            ("shared", &together, &together, true),
            ("absent", &None, &None, true),
            ("only-these", &apart, &together, true),
        ] {
            let mut config = node.pod_config(name);
            config.linux.get_or_insert_default().security_context =
                Some(LinuxSandboxSecurityContext {
                    namespace_options: of_pod.clone(),
                    ..Default::default()
                });
            let pod = node.run_pod_with(config)?;
            let start = |name: &str, command: &[&str]| {
                let mut config = pod.container_config(name, command);
                e2e::pod::security(&mut config).namespace_options = of_containers.clone();
                pod.start_with(config)
            };
            start("a", &["sleep", "98765"])?;
            let b = start("b", e2e::pod::IDLE)?;
            let processes = b.exec(&["ps", "-o", "pid,args"])?;
            assert_eq!(
                processes.contains("sleep 98765"),
                shared,
                "{name}: {processes}"
            );
            // Nothing else of the guest is in sight.
            let count = processes.lines().count();
            ensure!(count <= 7, "{name}: {processes}");
            pod.remove()?;
        }
        Ok(())
    })
}

#[test]
fn a_pod_without_a_host_name_has_as_much_of_its_own_as_one_may_have() -> Result<()> {
    with_drupe(|node| {
        let name = format!("{}.tail", "n".repeat(62));
        let mut config = node.pod_config(&name);
        config.hostname.clear();
        let container = node.run_pod_with(config)?.start_idle("c")?;
        assert_eq!(container.exec(&["hostname"])?, "n".repeat(62));
        let mut config = node.pod_config("given");
        config.hostname = "h".repeat(65);
        refused(
            node.try_run_pod(config).map(|pod| pod.id),
            Code::InvalidArgument,
            &["config.hostname", "64 bytes"],
        )?;
        Ok(())
    })
}

#[test]
fn sysctls_reach_the_pods_kernel() -> Result<()> {
    with_node(|node| {
        let mut config = node.pod_config("tuned");
        config.linux.get_or_insert_default().sysctls = HashMap::from([
            (
                "net.ipv4.ip_local_port_range".to_owned(),
                "20000 30000".to_owned(),
            ),
            ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
        ]);
        let container = node.run_pod_with(config)?.start_idle("c")?;
        assert_eq!(
            container.exec(&["cat", "/proc/sys/net/ipv4/ip_local_port_range"])?,
            "20000\t30000"
        );
        assert_eq!(
            container.exec(&["cat", "/proc/sys/kernel/shm_rmid_forced"])?,
            "1"
        );
        Ok(())
    })
}

#[test]
fn pods_asked_for_at_once_all_come_up_with_addresses_of_their_own() -> Result<()> {
    with_node(|node| {
        let pods = thread::scope(|scope| {
            let started: Vec<_> = (0..4)
                .map(|n| scope.spawn(move || node.run_pod(&format!("crowd-{n}"))))
                .collect();
            started
                .into_iter()
                .map(|thread| thread.join().expect("thread"))
                .collect::<Result<Vec<_>>>()
        })?;
        let mut addresses: Vec<_> = pods
            .iter()
            .map(|pod| pod.addresses())
            .collect::<Result<Vec<_>>>()?
            .concat();
        let count = addresses.len();
        addresses.sort();
        addresses.dedup();
        assert_eq!(
            addresses.len(),
            count,
            "addresses are shared: {addresses:?}"
        );
        for pod in &pods {
            pod.start_idle("c")?.exec(&["true"])?;
        }
        Ok(())
    })
}

#[test]
fn a_kubelet_that_asks_twice_gets_one_pod() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(()); // containerd answers that the name is reserved.
        }
        let config = node.pod_config("twice");
        std::fs::create_dir_all(&config.log_directory)?;
        let run = || node.try_run_pod(config.clone());
        let (first, second) = thread::scope(|scope| {
            let other = scope.spawn(run);
            let processes = || -> Result<()> {
                ensure!(!node.pod_processes()?.is_empty(), "nothing runs yet");
                Ok(())
            };
            let begun = eventually(
                "the first request to begin",
                Duration::from_secs(10),
                processes,
            );
            let second = run();
            (other.join().expect("thread"), begun.map(|()| second))
        });
        assert_eq!(first?.id, second??.id);
        Ok(())
    })
}

#[test]
fn a_machine_is_as_large_as_the_pod_asks() -> Result<()> {
    with_drupe(|node| {
        let memory_of = |name: &str, limit: i64| -> Result<u64> {
            let mut config = node.pod_config(name);
            config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
                memory_limit_in_bytes: limit,
                ..Default::default()
            });
            let container = node.run_pod_with(config)?.start_idle("c")?;
            let info = container.exec(&["cat", "/proc/meminfo"])?;
            let total = info
                .lines()
                .find_map(|line| line.strip_prefix("MemTotal:"))
                .context("MemTotal")?;
            Ok(total.trim().trim_end_matches(" kB").parse::<u64>()? / 1024)
        };
        let small = memory_of("small", 128 << 20)?;
        let large = memory_of("large", 1 << 30)?;
        ensure!(
            (128..400).contains(&small),
            "a pod limited to 128 MiB sees {small} MiB"
        );
        ensure!(
            (1024..1400).contains(&large),
            "a pod limited to 1 GiB sees {large} MiB"
        );
        Ok(())
    })
}

#[test]
fn inspecting_a_pod_shows_how_long_each_phase_of_its_start_took() -> Result<()> {
    with_drupe(|node| {
        let begun = Instant::now();
        let pod = node.run_pod("timed")?;
        let took = begun.elapsed();
        let timeline = e2e::pod::timeline(node, &pod.id)?;
        ensure!(timeline.len() >= 3, "{timeline:?}");
        for phase in &timeline {
            ensure!(!phase.name.is_empty(), "{timeline:?}");
            ensure!(
                phase.start + phase.duration <= took,
                "{phase:?} is longer than the whole start, {took:?}"
            );
        }
        Ok(())
    })
}

#[test]
fn crictl_shows_pods_containers_and_the_runtime() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("shown")?;
        let container = pod.start_idle("c")?;
        for (args, expected) in [
            (
                vec!["version"],
                if shares_the_hosts_kernel(node) {
                    "containerd"
                } else {
                    "drupe"
                },
            ),
            (vec!["info"], "RuntimeReady"),
            (vec!["pods"], "shown"),
            (vec!["ps"], "Running"),
            (vec!["inspectp", &pod.id], "SANDBOX_READY"),
            (vec!["inspect", &container.id], "CONTAINER_RUNNING"),
            (
                vec!["exec", "--sync", &container.id, "echo", "hello"],
                "hello",
            ),
        ] {
            let output = node.crictl_ok(&args)?;
            ensure!(
                output.contains(expected),
                "crictl {}: {expected:?} is not in {output}",
                args.join(" ")
            );
        }
        Ok(())
    })
}
