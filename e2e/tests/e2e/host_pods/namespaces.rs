//! What a pod shares with the node, and what is its own.

use std::fs;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::pod::IDLE;
use e2e::{Container, Node, Server, eventually};
use serde_json::json;
use tonic::Code;

use super::{
    HANDLER, NETWORK, PATIENCE, Shared, container_config, get, idle, kernel, namespace, pod_config,
    run, run_by_handler,
};
use crate::{refused, with_drupe, with_node};

#[test]
fn a_pod_on_the_nodes_network_has_its_interfaces_name_and_no_address() -> Result<()> {
    with_node(|node| {
        let links_before = node.netns.links()?;
        let pod = run(node, "agent", NETWORK)?;
        let container = idle(&pod, "c", NETWORK)?;
        let seen = container.exec(&["ls", "/sys/class/net"])?;
        for link in node.netns.links()? {
            ensure!(seen.split_whitespace().any(|s| s == link), "{link}: {seen}");
        }
        assert_eq!(node.netns.links()?, links_before, "it has made a link");
        assert_eq!(
            container.exec(&["hostname"])?,
            kernel(&fs::read_to_string("/proc/sys/kernel/hostname")?)
        );
        assert_eq!(
            container.exec(&["uname", "-r"])?,
            kernel(&fs::read_to_string("/proc/sys/kernel/osrelease")?)
        );
        assert_eq!(
            container.exec(&["cat", "/etc/hosts"])?.trim(),
            fs::read_to_string("/etc/hosts")?.trim()
        );
        let status = pod.status()?;
        let network = status.network.context("no network status")?;
        assert_eq!(network.ip, "");
        let options = status.linux.and_then(|linux| linux.namespaces);
        let options = options.and_then(|n| n.options).context("no namespaces")?;
        assert_eq!(options.network(), NamespaceMode::Node);
        assert_eq!(options.ipc(), NamespaceMode::Pod);
        // What it serves is on the node.
        let serve = &[
            "sh",
            "-c",
            "echo hello > /x; exec httpd -f -p 127.0.0.1:8090 -h /",
        ];
        let _server = pod.start_with(container_config(&pod, "server", serve, NETWORK))?;
        eventually("the node to reach it", PATIENCE, || {
            let answer = get(node, 8090, "/x")?;
            ensure!(answer.ends_with("hello\n"), "{answer}");
            Ok::<_, anyhow::Error>(())
        })
    })
}

#[test]
fn a_pod_on_the_nodes_network_needs_no_network_plugin() -> Result<()> {
    let node = Node::builder()
        .cni(|conflist| *conflist = json!(null))
        .start()?;
    node.pull_busybox()?;
    let pod = run(&node, "plugin", NETWORK)?;
    idle(&pod, "c", NETWORK)?.exec(&["true"])?;
    refused(
        node.try_run_pod(node.pod_config("other")).map(|pod| pod.id),
        if node.server == Server::Drupe {
            Code::Unavailable
        } else {
            Code::Unknown
        },
        &[],
    )?;
    node.finish()
}

#[test]
fn the_nodes_processes_and_shared_memory_are_seen_when_shared() -> Result<()> {
    with_drupe(|node| {
        let processes = Shared {
            pid: true,
            ..Shared::default()
        };
        let pod = run(node, "watcher", processes)?;
        let container = idle(&pod, "c", processes)?;
        let list = container.exec(&["ps"])?;
        ensure!(list.contains("drupe") && list.contains("serve"), "{list}");
        // Its network is its own.
        let seen = container.exec(&["ls", "/sys/class/net"])?;
        ensure!(!seen.contains("cni0") && seen.contains("eth0"), "{seen}");

        let memory = Shared {
            ipc: true,
            ..Shared::default()
        };
        let pod = run(node, "memory", memory)?;
        let container = idle(&pod, "c", memory)?;
        let of = |container: &Container, kind: &str| {
            container.exec(&["readlink", &format!("/proc/self/ns/{kind}")])
        };
        assert_eq!(of(&container, "ipc")?, namespace("/proc/self/ns/ipc")?);
        let note = format!("/dev/shm/drupe-e2e-{}", std::process::id());
        fs::write(&note, "shared")?;
        let read = container.exec(&["cat", &note]);
        fs::remove_file(&note)?;
        assert_eq!(read?, "shared");
        for kind in ["pid", "net", "uts", "mnt"] {
            ensure!(
                of(&container, kind)? != namespace(&format!("/proc/self/ns/{kind}"))?,
                "{kind} is the node's"
            );
        }
        Ok(())
    })
}

#[test]
fn a_pod_that_asks_for_the_handler_has_namespaces_of_its_own() -> Result<()> {
    with_drupe(|node| {
        let mut config = pod_config(node, "plain", Shared::default());
        config.linux.get_or_insert_default().sysctls = [
            (
                "net.ipv4.ip_unprivileged_port_start".to_owned(),
                "77".to_owned(),
            ),
            ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
        ]
        .into();
        let pod = run_by_handler(node, config)?;
        let first = idle(&pod, "first", Shared::default())?;
        let second = idle(&pod, "second", Shared::default())?;
        assert_eq!(
            first.exec(&["uname", "-r"])?,
            kernel(&fs::read_to_string("/proc/sys/kernel/osrelease")?)
        );
        assert_eq!(first.exec(&["hostname"])?, "plain");
        assert_eq!(first.exec(&["cat", "/etc/hostname"])?, "plain");
        let sysctl = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
        assert_eq!(second.exec(&["cat", sysctl])?, "77");
        ensure!(kernel(&fs::read_to_string(sysctl)?) != "77", "the node's");
        assert_eq!(
            second.exec(&["cat", "/proc/sys/kernel/shm_rmid_forced"])?,
            "1"
        );
        // Network, IPC and name are the pod's, processes the container's.
        for kind in ["net", "ipc", "uts"] {
            let path = format!("/proc/self/ns/{kind}");
            let of = |container: &Container| container.exec(&["readlink", &path]);
            assert_eq!(of(&first)?, of(&second)?, "{kind}");
            ensure!(of(&first)? != namespace(&path)?, "{kind} is the node's");
        }
        ensure!(!first.exec(&["ps"])?.contains("drupe"), "it sees the node");
        assert_eq!(first.exec(&["cat", "/proc/1/comm"])?, "sh");
        first.exec(&["sh", "-c", "echo x > /dev/shm/note"])?;
        assert_eq!(second.exec(&["cat", "/dev/shm/note"])?, "x");
        // It has the network that plugins make.
        let addresses = pod.addresses()?;
        let shown = first.exec(&["ip", "addr", "show", "eth0"])?;
        for address in &addresses {
            ensure!(shown.contains(address.as_str()), "{address}: {shown}");
        }
        let hosts = first.exec(&["cat", "/etc/hosts"])?;
        ensure!(
            hosts.contains(&format!("{}\tplain", addresses[0])),
            "{hosts}"
        );
        first.exec(&["ping", "-c", "1", "-W", "5", "10.88.0.1"])?;
        assert_eq!(pod.status()?.runtime_handler, HANDLER);
        Ok(())
    })
}

#[test]
fn what_would_change_the_node_is_refused() -> Result<()> {
    with_drupe(|node| {
        let mut config = pod_config(node, "sysctl", NETWORK);
        let name = "net.ipv4.ip_forward".to_owned();
        config.linux.get_or_insert_default().sysctls = [(name, "0".to_owned())].into();
        refused(
            node.try_run_pod(config).map(|pod| pod.id),
            Code::InvalidArgument,
            &["net.ipv4.ip_forward", "host's network"],
        )?;
        // Nor does a container of a microVM reach the node.
        let pod = node.run_pod("virtual")?;
        let config = container_config(&pod, "c", IDLE, NETWORK);
        refused(
            pod.create(config).map(|container| container.id),
            Code::Unimplemented,
            &["network", "host's network"],
        )?;
        node.assert_no_running_pod_left().unwrap_err();
        pod.stop()?;
        pod.remove()?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_user_namespace_of_the_pods_own_is_refused() -> Result<()> {
    with_drupe(|node| {
        let mut config = pod_config(node, "users", Shared::default());
        let ids = || {
            vec![IdMapping {
                host_id: 1 << 20,
                container_id: 0,
                length: 65_536,
            }]
        };
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        let options = context.namespace_options.get_or_insert_default();
        options.userns_options = Some(UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: ids(),
            gids: ids(),
        });
        let request = RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: HANDLER.to_owned(),
        };
        refused(
            node.cri()?.run_pod_sandbox(request),
            Code::FailedPrecondition,
            &["userns_options", "host's kernel"],
        )?;
        Ok(())
    })
}

#[test]
fn a_container_is_not_in_namespaces_of_the_node_that_its_pod_is_not_in() -> Result<()> {
    with_drupe(|node| {
        let pod = run_by_handler(node, pod_config(node, "apart", Shared::default()))?;
        let config = container_config(&pod, "c", IDLE, NETWORK);
        refused(
            pod.create(config).map(|container| container.id),
            Code::InvalidArgument,
            &["namespace_options.network", "NODE"],
        )?;
        idle(&pod, "c", Shared::default()).map(drop)
    })
}
