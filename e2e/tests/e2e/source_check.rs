//! What a pod can send as somebody else.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::node::BRIDGE;
use e2e::pod::{Container, IDLE, Pod, security};
use e2e::{Node, eventually};
use serde_json::json;

use crate::{on_drupe, with_drupe};

/// Nobody's, in the pods' subnet.
const NOBODY: &str = "10.88.0.222";
const OTHER_MAC: &str = "02:00:00:00:00:77";

/// A container that may set up its pod's network, as a hostile guest can.
fn network_admin(pod: &Pod) -> Result<Container> {
    let mut config = pod.container_config("admin", IDLE);
    security(&mut config).capabilities = Some(Capability {
        add_capabilities: vec!["NET_ADMIN".to_owned()],
        ..Default::default()
    });
    pod.start_with(config)
}

struct Two {
    forger: Container,
    victim: Container,
    forger_ip: String,
    victim_ip: String,
}

impl Two {
    fn start(node: &Node) -> Result<Self> {
        let victim = node.run_pod("victim")?;
        let forger = node.run_pod("forger")?;
        let two = Self {
            forger_ip: forger.addresses()?.remove(0),
            victim_ip: victim.addresses()?.remove(0),
            forger: network_admin(&forger)?,
            victim: victim.start_idle("c")?,
        };
        two.ping(&[])?;
        Ok(two)
    }

    /// Whether the victim answers the forger.
    fn ping(&self, options: &[&str]) -> Result<()> {
        let mut command = vec!["ping", "-c", "1", "-W", "5"];
        command.extend(options);
        command.push(&self.victim_ip);
        self.forger.exec(&command).map(drop)
    }

    /// How many pings have come to the victim.
    fn pings(&self) -> Result<u64> {
        let table = self.victim.exec(&["grep", "^Icmp:", "/proc/net/snmp"])?;
        let mut lines = table.lines().map(str::split_whitespace);
        let (names, mut figures) = lines.next().zip(lines.next()).context("two lines")?;
        let column = names.clone().position(|name| name == "InEchos");
        let figure = column.and_then(|column| figures.nth(column));
        Ok(figure.context(table.clone())?.parse()?)
    }

    /// Pings from an address that the network has not given to the forger.
    fn forge_ping(&self) -> Result<()> {
        let add = ["ip", "address", "add", NOBODY, "dev", "eth0"];
        self.forger.exec(&add)?;
        // Nobody answers to there.
        let command = ["ping", "-c", "3", "-W", "1", "-I", NOBODY, &self.victim_ip];
        let answer = self.forger.exec_sync(&command, 20)?;
        let said = String::from_utf8_lossy(&answer.stdout);
        ensure!(said.contains("3 packets transmitted"), "{said}");
        Ok(())
    }

    /// The pod's routes but that of its own subnet go.
    fn set_mac(&self, mac: &str) -> Result<()> {
        let script = format!("ip link set eth0 down; ip link set eth0 address {mac} up");
        self.forger.exec(&["sh", "-c", &script]).map(drop)
    }

    /// Tells the node that the victim's address is the forger's.
    fn forge_arp(&self) -> Result<()> {
        let script = format!(
            "ip address add {0}/32 dev eth0 && busybox arping -U -c 3 -I eth0 -s {0} {0}; \
             ip address del {0}/32 dev eth0",
            self.victim_ip
        );
        self.forger.exec(&["sh", "-c", &script]).map(drop)
    }
}

/// Whom the node sends to for an address.
fn neighbour(node: &Node, ip: &str) -> Result<String> {
    let entry = node
        .netns
        .output("ip", &["neigh", "show", ip, "dev", BRIDGE])?;
    let mut words = entry
        .split_whitespace()
        .skip_while(|word| *word != "lladdr");
    Ok(words.nth(1).context(entry.clone())?.to_owned())
}

fn mac_of(container: &Container) -> Result<String> {
    container.exec(&["cat", "/sys/class/net/eth0/address"])
}

/// Lets the node send something to an address.
fn meet(node: &Node, ip: &str) -> Result<String> {
    node.netns.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.send_to(b"hello", (ip, 9))?;
        Ok(())
    })?;
    eventually(
        "the pod to answer the node",
        Duration::from_secs(10),
        || neighbour(node, ip),
    )
}

/// How many frames of the node's pods their taps have dropped.
fn dropped(node: &Node) -> Result<Vec<u64>> {
    let dir = node.netns_dir();
    let names = std::fs::read_dir(&dir).with_context(|| format!("{dir:?}"))?;
    names
        .map(|name| {
            let net = format!("--net={}", name?.path().display());
            let show = [&net, "tc", "-s", "qdisc", "show", "dev", "tap0", "ingress"];
            let text = node.netns.output("nsenter", &show)?;
            let rest = text.split("dropped ").nth(1).context(text.clone())?;
            Ok(rest.split(',').next().context(text.clone())?.parse()?)
        })
        .collect()
}

#[test]
fn an_ordinary_pod_loses_nothing_of_what_it_sends() -> Result<()> {
    with_drupe(|node| {
        let server = node.run_pod("server")?;
        let listen = "mkdir /www && echo hello > /www/page && exec httpd -f -p 8080 -h /www";
        server.start("web", &["sh", "-c", listen])?;
        let client = node.run_pod("client")?.start_idle("c")?;
        for address in server.addresses()? {
            let host = match address.contains(':') {
                true => format!("[{address}]"),
                false => address,
            };
            let url = format!("http://{host}:8080/page");
            eventually(&url, Duration::from_secs(10), || {
                client.exec(&["wget", "-q", "-O", "-", &url])
            })?;
        }
        assert_eq!(dropped(node)?, [0, 0]);
        Ok(())
    })
}

#[test]
fn a_pod_cannot_speak_as_another() -> Result<()> {
    with_drupe(|node| {
        let two = Two::start(node)?;
        let before = two.pings()?;
        two.forge_ping()?;
        // What was sent before this one would have arrived before.
        two.ping(&["-I", &two.forger_ip])?;
        assert_eq!(two.pings()?, before + 1, "pings of {NOBODY} arrived");

        let victim_mac = mac_of(&two.victim)?;
        assert_eq!(meet(node, &two.victim_ip)?, victim_mac);
        two.forge_arp()?;
        two.ping(&["-I", &two.forger_ip])?;
        assert_eq!(neighbour(node, &two.victim_ip)?, victim_mac);

        let own = mac_of(&two.forger)?;
        let before = two.pings()?;
        two.set_mac(OTHER_MAC)?;
        let forged = two
            .forger
            .exec_sync(&["ping", "-c", "1", "-W", "1", &two.victim_ip], 20)?;
        ensure!(forged.exit_code != 0, "{OTHER_MAC} was answered");
        assert_eq!(two.pings()?, before);
        two.set_mac(&own)?;
        eventually("its own MAC", Duration::from_secs(10), || two.ping(&[]))
    })
}

#[test]
fn a_pod_of_an_exempt_namespace_sends_as_it_likes() -> Result<()> {
    let node = Node::builder()
        .config(|config| config["network"]["source_check_exempt"] = json!(["other", "e2e"]))
        .start()?;
    on_drupe(node, |node| {
        node.pull_busybox()?;
        let two = Two::start(node)?;
        let before = two.pings()?;
        two.forge_ping()?;
        eventually("the forged pings", Duration::from_secs(10), || {
            let now = two.pings()?;
            ensure!(now == before + 3, "{now} after {before}");
            Ok::<_, anyhow::Error>(())
        })?;
        meet(node, &two.victim_ip)?;
        let forger_mac = mac_of(&two.forger)?;
        eventually("the forged address", Duration::from_secs(20), || {
            two.forge_arp()?;
            let now = neighbour(node, &two.victim_ip)?;
            ensure!(now == forger_mac, "{now}");
            Ok::<_, anyhow::Error>(())
        })?;
        two.set_mac(OTHER_MAC)?;
        eventually("an answer to another MAC", Duration::from_secs(10), || {
            two.ping(&[])
        })
    })
}
