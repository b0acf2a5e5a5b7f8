//! A pod's network: who reaches whom, host ports, and what the plugins are told.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::node::{BRIDGE, SUBNET_V4};
use e2e::{Node, eventually, http};

use crate::{shares_the_hosts_kernel, with_node};

const WEB_SERVER: &[&str] = &[
    "sh",
    "-c",
    "mkdir -p /www && echo hello from $(hostname) > /www/index.html && exec httpd -f -p 8080 -h /www",
];

#[test]
fn two_containers_of_a_pod_talk_over_localhost() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("local")?;
        pod.start("server", WEB_SERVER)?;
        let client = pod.start_idle("client")?;
        let page = eventually("the server to answer", Duration::from_secs(10), || {
            client.exec(&["wget", "-q", "-O", "-", "http://127.0.0.1:8080/"])
        })?;
        assert_eq!(page, "hello from local");
        Ok(())
    })
}

#[test]
fn two_pods_talk_over_the_bridge_by_ipv4_and_ipv6() -> Result<()> {
    with_node(|node| {
        let server = node.run_pod("server")?;
        server.start("web", WEB_SERVER)?;
        let client = node.run_pod("client")?.start_idle("c")?;
        let addresses = server.addresses()?;
        assert_eq!(addresses.len(), 2, "{addresses:?}");
        for address in addresses {
            let host = if address.contains(':') {
                format!("[{address}]")
            } else {
                address
            };
            let url = format!("http://{host}:8080/");
            let page = eventually(&url, Duration::from_secs(10), || {
                client.exec(&["wget", "-q", "-O", "-", &url])
            })?;
            assert_eq!(page, "hello from server");
        }
        Ok(())
    })
}

#[test]
fn a_pod_reaches_its_node_and_the_node_reaches_the_pod() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("reach")?;
        let web = pod.start("web", WEB_SERVER)?;
        let address = format!("{}:8080", pod.addresses()?[0]);
        let page = eventually(
            "the pod to answer the node",
            Duration::from_secs(10),
            || node.netns.run(|| http::get(&address, "/")),
        )?;
        assert_eq!(page.body, b"hello from reach\n");
        // The default route's gateway is the node's end of the bridge.
        let gateway = SUBNET_V4.replace("0/24", "1");
        let routes = web.exec(&["ip", "route"])?;
        ensure!(
            routes.contains(&format!("default via {gateway}")),
            "{routes}"
        );
        web.exec(&["ping", "-c", "1", "-W", "5", &gateway])
            .map(drop)
    })
}

#[test]
fn a_host_port_reaches_the_pod() -> Result<()> {
    with_node(|node| {
        let mut config = node.pod_config("ported");
        config.port_mappings = vec![PortMapping {
            protocol: Protocol::Tcp.into(),
            container_port: 8080,
            host_port: 18080,
            host_ip: String::new(),
        }];
        let pod = node.run_pod_with(config)?;
        pod.start("web", WEB_SERVER)?;
        for host in [
            "127.0.0.1:18080".to_owned(),
            format!("{}:18080", SUBNET_V4.replace("0/24", "1")),
        ] {
            let page = eventually(&host, Duration::from_secs(10), || {
                node.netns.run(|| http::get(&host, "/"))
            })?;
            assert_eq!(page.body, b"hello from ported\n");
        }
        Ok(())
    })
}

#[test]
fn host_ports_are_of_one_protocol_and_of_one_address_where_it_is_named() -> Result<()> {
    with_node(|node| {
        let gateway = SUBNET_V4.replace("0/24", "1");
        let port = |protocol: Protocol, host_port, host_ip: &str| PortMapping {
            protocol: protocol.into(),
            container_port: 8080,
            host_port,
            host_ip: host_ip.to_owned(),
        };
        let mut config = node.pod_config("ports");
        config.port_mappings = vec![
            port(Protocol::Udp, 18053, ""),
            port(Protocol::Udp, 18054, ""),
            port(Protocol::Tcp, 18081, &gateway),
        ];
        let pod = node.run_pod_with(config)?;
        let web = pod.start("web", WEB_SERVER)?;
        let page = |host: &str| {
            let host = format!("{host}:18081");
            node.netns.run(|| http::get(&host, "/"))
        };
        let answer = eventually("the named address", Duration::from_secs(10), || {
            page(&gateway)
        })?;
        assert_eq!(answer.body, b"hello from ports\n");
        ensure!(page("127.0.0.1").is_err(), "another address than the named");

        // Nobody listens on the pod's UDP port: its kernel counts what comes.
        let unheard = || -> Result<u64> {
            let table = web.exec(&["grep", "^Udp:", "/proc/net/snmp"])?;
            let figure = table
                .lines()
                .last()
                .and_then(|l| l.split_whitespace().nth(2));
            Ok(figure.context(table.clone())?.parse()?)
        };
        let send = |port: u16| {
            let to = format!("{gateway}:{port}");
            node.netns.run(|| {
                let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
                socket.send_to(b"datagram", &to)?;
                Ok(())
            })
        };
        let mut before = unheard()?;
        for port in [18053, 18054] {
            send(port)?;
            eventually("the datagram to arrive", Duration::from_secs(10), || {
                let now = unheard()?;
                ensure!(now == before + 1, "{now} after {before}");
                Ok::<_, anyhow::Error>(())
            })?;
            before += 1;
        }
        // The other protocol's port of the same number is the node's own.
        send(18081)?;
        send(18053)?;
        eventually("the last datagram", Duration::from_secs(10), || {
            let now = unheard()?;
            ensure!(now > before, "{now} after {before}");
            Ok::<_, anyhow::Error>(())
        })?;
        assert_eq!(unheard()?, before + 1);
        Ok(())
    })
}

#[test]
fn the_network_turns_ready_when_its_configuration_appears() -> Result<()> {
    let node = Node::builder()
        .cni(|conflist| *conflist = serde_json::Value::Null)
        .start()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish(); // containerd does not notice a file that was moved in.
    }
    let cri = node.cri()?;
    let network_condition = || -> Result<RuntimeCondition> {
        let status = cri
            .status(StatusRequest { verbose: false })?
            .status
            .context("status")?;
        status
            .conditions
            .into_iter()
            .find(|c| c.r#type == "NetworkReady")
            .context("no NetworkReady condition")
    };
    let before = network_condition()?;
    ensure!(!before.status, "ready without any configuration");
    ensure!(
        !before.reason.is_empty() && !before.message.is_empty(),
        "no reason given: {before:?}"
    );

    node.write_cni(&node.default_cni())?;
    eventually("NetworkReady", Duration::from_secs(10), || {
        let now = network_condition()?;
        ensure!(now.status, "{now:?}");
        Ok::<_, anyhow::Error>(())
    })?;
    node.run_pod("late")?;
    node.finish()
}

#[test]
fn a_bandwidth_limit_is_handed_to_the_plugin() -> Result<()> {
    with_node(|node| {
        let mut config = node.pod_config("narrow");
        config.annotations = HashMap::from([
            (
                "kubernetes.io/ingress-bandwidth".to_owned(),
                "8M".to_owned(),
            ),
            (
                "kubernetes.io/egress-bandwidth".to_owned(),
                "16M".to_owned(),
            ),
        ]);
        node.run_pod_with(config)?;
        let queues = node.netns.output("tc", &["qdisc", "show"])?;
        ensure!(
            queues.contains("rate 8Mbit") && queues.contains("rate 16Mbit"),
            "{queues}"
        );
        Ok(())
    })
}

#[test]
fn a_pods_link_on_the_bridge_goes_with_the_pod() -> Result<()> {
    with_node(|node| {
        let on_bridge = || {
            node.netns
                .output("ip", &["-br", "link", "show", "master", BRIDGE])
        };
        let pod = node.run_pod("linked")?;
        assert_eq!(on_bridge()?.lines().count(), 1);
        pod.stop()?;
        assert_eq!(on_bridge()?, "");
        Ok(())
    })
}
