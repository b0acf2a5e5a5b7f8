//! Attachments by Debian's own plugins: made, checked, undone, collected.

use std::fs;

use super::*;
use crate::{
    read_interface,
    testing::{self, Host, bridge_network, cni, pod, run},
};

#[tokio::test]
async fn a_dual_stack_pod_with_a_host_port_and_a_rate_leaves_nothing_behind() {
    let host = Host::enter();
    let cni = cni(&host);
    let network = bridge_network(&host);

    // The first pod makes what all pods share: the bridge and the top chains.
    let first = netns(&host, "first").await;
    let mut wants = pod("first", &first);
    wants.port_mappings = vec![forwarded(8081)];
    cni.add(&network, &wants).await.unwrap();
    cni.del("first", "eth0").await.unwrap();
    first.remove().await.unwrap();
    let before = census(&host);
    assert!(
        before.leases.is_empty() && before.records.is_empty(),
        "{before:?}"
    );

    let ns = netns(&host, "pod").await;
    let mut wants = pod("second", &ns);
    wants.port_mappings = vec![forwarded(8080)];
    wants.bandwidth = Some(Bandwidth {
        ingress_rate: Some(8_000_000),
        egress_rate: Some(4_000_000),
        ..Bandwidth::default()
    });
    let result = cni.add(&network, &wants).await.unwrap();
    let ips: Vec<_> = result.pod_ips().collect();
    assert_eq!(ips.len(), 2, "{result:?}");
    assert!(ips[0].is_ipv4() && ips[1].is_ipv6());

    let during = census(&host);
    assert_eq!(during.leases.len(), 2);
    assert!(
        during
            .rules
            .iter()
            .any(|rule| rule.contains("--dport 8080")),
        "{during:?}"
    );
    assert!(run("tc", &["qdisc"]).contains("tbf"));
    let interface = read_interface(&ns, "eth0").await.unwrap();
    let read: Vec<_> = interface.addresses.iter().map(|net| net.addr()).collect();
    assert_eq!(read, ips);
    assert_eq!(interface.mtu, 1400);
    let gateways: Vec<String> = interface
        .routes
        .iter()
        .map(|route| format!("{} {}", route.destination, route.gateway.unwrap()))
        .collect();
    assert_eq!(gateways, ["0.0.0.0/0 10.88.0.1", "::/0 fd00:88::1"]);

    // Another Cni, as after a restart, knows the attachment.
    let restarted = testing::cni(&host);
    assert_eq!(restarted.result("second", "eth0").await.unwrap(), result);
    assert!(matches!(
        restarted.add(&network, &wants).await,
        Err(CniError::AlreadyAttached { .. })
    ));
    restarted.del("second", "eth0").await.unwrap();
    restarted.del("second", "eth0").await.unwrap();
    ns.remove().await.unwrap();
    assert_eq!(census(&host), before);
}

/// With Debian's portmap, which looks for a dual-stack pod's IPv4 rules among
/// those of IPv6, and its bandwidth, which crashes for a pod without a rate.
#[tokio::test]
async fn check_tells_an_attachment_that_was_tampered_with_and_no_other() {
    let host = Host::enter();
    let cni = cni(&host);
    let ns = netns(&host, "pod").await;
    let mut wants = pod("p", &ns);
    wants.port_mappings = vec![forwarded(8080)];
    cni.add(&bridge_network(&host), &wants).await.unwrap();
    for _ in 0..2 {
        let complaints = cni.check("p", "eth0").await.unwrap();
        assert!(complaints.is_empty(), "{complaints:?}");
    }
    testing::ip(ns.path(), "address flush dev eth0");
    let complaints = cni.check("p", "eth0").await.unwrap();
    assert_eq!(complaints.len(), 1, "{complaints:?}");
    let complaint = complaints[0].to_string();
    assert!(
        complaint.contains("bridge (CHECK of pod p) failed: "),
        "{complaint}"
    );
    cni.del("p", "eth0").await.unwrap();
    assert!(matches!(
        cni.check("p", "eth0").await,
        Err(CniError::NotAttached { .. })
    ));
}

#[tokio::test]
async fn del_needs_neither_the_namespace_nor_the_configuration() {
    let host = Host::enter();
    let ns = netns(&host, "pod").await;
    let version_0_3 = bridge_then(&host, "0.3.1", &[]);
    cni(&host).add(&version_0_3, &pod("p", &ns)).await.unwrap();
    assert_eq!(leases(&host).len(), 2);
    ns.remove().await.unwrap();
    fs::write(ns.path(), "").unwrap();
    cni(&host).del("p", "eth0").await.unwrap();
    assert!(leases(&host).is_empty());
    assert!(names(&host.dir().join("records")).is_empty());
}

#[tokio::test]
async fn gc_detaches_what_nobody_answers_for() {
    let host = Host::enter();
    let cni = cni(&host);
    let network = bridge_then(&host, "1.0.0", &[]);
    for name in ["kept", "stale"] {
        let ns = netns(&host, name).await;
        cni.add(&network, &pod(name, &ns)).await.unwrap();
    }
    assert_eq!(leases(&host).len(), 4);
    let kept = Attachment {
        sandbox_id: "kept".to_owned(),
        interface: "eth0".to_owned(),
    };
    let valid = BTreeSet::from([kept.clone()]);
    collect(&cni, Some(&network), &valid).await;
    assert_eq!(leases(&host).len(), 2);
    assert_eq!(cni.attachments().await.unwrap(), [kept]);
    assert!(cni.check("kept", "eth0").await.unwrap().is_empty());
    collect(&cni, None, &BTreeSet::new()).await;
    assert!(leases(&host).is_empty());
}
