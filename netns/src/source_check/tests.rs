//! On a real tap: what a guest writes, and what comes out at the other end of
//! CNI's interface.

mod cases;
mod packets;

use std::{
    collections::BTreeSet,
    num::NonZeroU32,
    ops::Range,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket},
};

use self::{cases::*, packets::*};
use super::*;
use crate::{
    Netns, NetnsError, create_tap, redirect,
    testing::{
        self,
        guest::{ARP, Guest, arp, frame},
    },
    try_source_check,
};

/// Tests' frames go to these, by which they are known again.
const NUMBERED: [u8; 4] = [2, 0, 0, 1];
const LAST: u16 = u16::MAX;

/// A pod's interface, whose other end is `wire` in the test's own network.
struct Pod {
    netns: Netns,
    guest: Guest,
    wire: OwnedFd,
    _host: testing::Host,
}

async fn pod(addresses: &[&str], check: SourceCheck) -> Pod {
    let host = testing::Host::enter();
    let netns = Netns::create(host.dir(), "pod").await.unwrap();
    let path = netns.path().to_str().unwrap();
    let veth =
        format!("link add wire type veth peer name eth0 address 02:00:00:00:00:05 netns {path}");
    testing::run("ip", &veth.split_whitespace().collect::<Vec<_>>());
    testing::run("ip", &["link", "set", "wire", "up"]);
    for address in addresses {
        testing::ip(
            netns.path(),
            &format!("address add {address} dev eth0 nodad"),
        );
    }
    testing::ip(netns.path(), "link set eth0 up");
    let mut queues = create_tap(&netns, "tap0", 0, NonZeroU32::MIN)
        .await
        .unwrap();
    let mut guest = Guest::on(&netns, queues.remove(0), MAC).await;

    let early = guest.send_frame(&frame(ALL, MAC, ARP, &arp(1, MAC, V4, OTHER_V4)));
    let error = early.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");

    redirect(&netns, "eth0", "tap0", check).await.unwrap();
    let wire = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .unwrap();
    Pod {
        netns,
        guest,
        wire,
        _host: host,
    }
}

impl Pod {
    /// Sends all of them and tells which came out.
    fn come_out(&mut self, frames: &[Vec<u8>]) -> BTreeSet<usize> {
        let closing = frame(ALL, MAC, ARP, &arp(1, MAC, V4, OTHER_V4));
        let numbered = (0u16..).zip(frames);
        for (number, frame) in numbered.chain([(LAST, &closing)]) {
            let number = number.to_be_bytes();
            let frame = [&NUMBERED[..], &number, &frame[6..]].concat();
            self.guest.send_frame(&frame).unwrap();
        }
        let mut out = BTreeSet::new();
        loop {
            let number = self.next_out();
            if number == LAST {
                return out;
            }
            out.insert(usize::from(number));
        }
    }

    fn next_out(&self) -> u16 {
        let mut bytes = [0; 2048];
        loop {
            match recv(self.wire.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Ok(_) if bytes[..4] == NUMBERED => {
                    return u16::from_be_bytes([bytes[4], bytes[5]]);
                }
                Ok(_) => {}
                Err(nix::Error::EAGAIN) => {
                    let mut fds = [PollFd::new(self.wire.as_fd(), PollFlags::POLLIN)];
                    let ready = poll(&mut fds, PollTimeout::from(8000u16)).unwrap();
                    assert_eq!(ready, 1, "the last frame does not come out");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Packets that the namespace's own stack has seen, IPv4 and IPv6.
    fn seen_by_its_stack(&self) -> String {
        let net = format!("--net={}", self.netns.path().display());
        let counts = "grep ^Ip: /proc/net/snmp; grep Ip6InReceives /proc/net/snmp6";
        let text = testing::run("nsenter", &[&net, "sh", "-c", counts]);
        let received = |line: &str| line.split_whitespace().nth(3).map(str::to_owned);
        let v4 = text.lines().nth(1).and_then(received).unwrap();
        format!("{v4} {}", text.lines().nth(2).unwrap())
    }

    /// What tc has counted.
    fn dropped(&self) -> usize {
        let net = format!("--net={}", self.netns.path().display());
        let command = [&net, "tc", "-s", "qdisc", "show", "dev", "tap0", "ingress"];
        let text = testing::run("nsenter", &command);
        let count = text
            .split("dropped ")
            .nth(1)
            .and_then(|rest| rest.split(',').next());
        count.unwrap().parse().unwrap()
    }
}

/// Whatever of `cases` does not come out is named.
fn split(cases: &[Case], out: &BTreeSet<usize>) -> (Vec<&'static str>, Vec<&'static str>) {
    let (mut came, mut lost) = (Vec::new(), Vec::new());
    for (i, (name, _)) in cases.iter().enumerate() {
        if out.contains(&i) {
            &mut came
        } else {
            &mut lost
        }
        .push(*name);
    }
    (came, lost)
}

fn frames(cases: &[Case]) -> Vec<Vec<u8>> {
    cases.iter().map(|(_, frame)| frame.clone()).collect()
}

#[tokio::test]
async fn what_a_guest_sends_as_itself_comes_out() {
    let mut pod = pod(BOTH, SourceCheck::On).await;
    let cases = what_a_pod_sends();
    let out = pod.come_out(&frames(&cases));
    assert_eq!(split(&cases, &out).1, Vec::<&str>::new());
    assert_eq!(pod.dropped(), 0);
}

#[tokio::test]
async fn what_a_guest_forges_is_dropped_and_counted() {
    let mut pod = pod(BOTH, SourceCheck::On).await;
    let cases = what_it_does_not_send();
    let before = pod.seen_by_its_stack();
    let out = pod.come_out(&frames(&cases));
    assert_eq!(split(&cases, &out).0, Vec::<&str>::new());
    assert_eq!(pod.dropped(), cases.len());
    assert_eq!(pod.seen_by_its_stack(), before);
}

#[tokio::test]
async fn a_guest_that_is_not_checked_sends_what_it_likes() {
    let mut pod = pod(BOTH, SourceCheck::Off).await;
    let before = pod.seen_by_its_stack();
    let mut cases = what_it_does_not_send();
    cases.extend(what_a_pod_sends());
    let out = pod.come_out(&frames(&cases));
    assert_eq!(split(&cases, &out).1, Vec::<&str>::new());
    assert_eq!(pod.seen_by_its_stack(), before);
}

#[tokio::test]
async fn no_bit_of_who_speaks_can_be_another() {
    const IP: usize = 14;
    let own = link_option(1, MAC);
    let advertisement = from_v6(V6, 58, &nd(136, V6, &link_option(2, MAC)));
    // What of each frame says who speaks.
    let held: [(Vec<u8>, &[Range<usize>]); 6] = [
        (from_v4(V4, 6, TCP), &[6..12, IP + 12..IP + 16]),
        (
            frame(ALL, MAC, ARP, &arp(2, MAC, V4, OTHER_V4)),
            &[6..12, IP..IP + 6, IP + 8..IP + 18],
        ),
        (from_v6(V6, 6, TCP), &[6..12, IP + 8..IP + 24]),
        (from_v6(LINK_LOCAL, 6, TCP), &[6..12, IP + 8..IP + 24]),
        (
            from_v6(V6, 58, &nd(135, OTHER_V6, &own)),
            &[6..12, IP + 8..IP + 24, IP + 66..IP + 72],
        ),
        (
            advertisement,
            &[6..12, IP + 8..IP + 24, IP + 48..IP + 64, IP + 66..IP + 72],
        ),
    ];
    let mut pod = pod(BOTH, SourceCheck::On).await;
    let mut frames: Vec<Vec<u8>> = held.iter().map(|(frame, _)| frame.clone()).collect();
    for (frame, places) in &held {
        for at in places.iter().cloned().flatten() {
            for bit in 0..8 {
                let mut flipped = frame.clone();
                flipped[at] ^= 1 << bit;
                frames.push(flipped);
            }
        }
    }
    let out = pod.come_out(&frames);
    let unflipped: BTreeSet<usize> = (0..held.len()).collect();
    assert_eq!(out, unflipped);
    assert!(frames.len() > 800, "{}", frames.len());
}

#[tokio::test]
async fn without_an_ipv6_address_a_guest_makes_its_own_of_any_prefix() {
    let mut pod = pod(&["10.9.0.5/24"], SourceCheck::On).await;
    let pass: Vec<Case> = vec![
        ("its link-local address", from_v6(LINK_LOCAL, 6, TCP)),
        ("a prefix of a router's", from_v6(SLAAC, 6, TCP)),
        ("is it taken?", from_v6("::", 58, &nd(135, SLAAC, &[]))),
        (
            "advertisement",
            from_v6(SLAAC, 58, &nd(136, SLAAC, &link_option(2, MAC))),
        ),
    ];
    let refused: Vec<Case> = vec![
        (
            "another's identifier",
            from_v6("2001:db8:1:2:0:ff:fe00:6", 6, TCP),
        ),
        ("a made up identifier", from_v6(V6, 6, TCP)),
        (
            "another's address",
            from_v6(SLAAC, 58, &nd(136, OTHER_V6, &[])),
        ),
        (
            "claiming another's",
            from_v6("::", 58, &nd(135, OTHER_V6, &[])),
        ),
        ("advertising a router", from_v6(SLAAC, 58, &icmp(134, &[]))),
        ("a second IPv4 address", from_v4(SECOND_V4, 6, TCP)),
    ];
    let cases = [pass.clone(), refused].concat();
    let out = pod.come_out(&frames(&cases));
    let expected: Vec<&str> = pass.iter().map(|(name, _)| *name).collect();
    assert_eq!(split(&cases, &out).0, expected);
}

#[tokio::test]
async fn the_namespaces_stack_forwards_nothing_whatever_a_plugin_has_set() {
    let host = testing::Host::enter();
    let netns = Netns::create(host.dir(), "pod").await.unwrap();
    let inside = |command: &str| {
        let net = format!("--net={}", netns.path().display());
        testing::run("nsenter", &[&net, "sh", "-c", command])
    };
    testing::ip(netns.path(), "link add eth0 type veth peer name eth1");
    testing::ip(netns.path(), "link set eth0 up");
    inside("cd /proc/sys/net; echo 1 > ipv4/ip_forward; echo 1 > ipv6/conf/all/forwarding");
    let _tap = create_tap(&netns, "tap0", 0, NonZeroU32::MIN)
        .await
        .unwrap();
    redirect(&netns, "eth0", "tap0", SourceCheck::Off)
        .await
        .unwrap();
    let now = inside("cd /proc/sys/net; cat ipv4/conf/*/forwarding ipv6/conf/*/forwarding");
    assert!(now.lines().count() > 6 && !now.contains('1'), "{now}");
}

#[tokio::test]
async fn more_addresses_than_can_be_checked_are_an_error_that_counts_them() {
    let host = testing::Host::enter();
    let netns = Netns::create(host.dir(), "pod").await.unwrap();
    testing::ip(netns.path(), "link add eth0 type veth peer name eth1");
    let add = |i| format!("address add fd00::{i:x}/64 dev eth0 nodad\n");
    let batch = host.dir().join("batch");
    std::fs::write(&batch, (1..=300).map(add).collect::<String>()).unwrap();
    testing::ip(netns.path(), &format!("-batch {}", batch.display()));
    testing::ip(netns.path(), "link set eth0 up");
    let _tap = create_tap(&netns, "tap0", 0, NonZeroU32::MIN)
        .await
        .unwrap();
    let error = redirect(&netns, "eth0", "tap0", SourceCheck::On)
        .await
        .unwrap_err();
    let counted = matches!(error, NetnsError::TooManyAddresses { count: 300, .. });
    assert!(counted, "{error}");
    redirect(&netns, "eth0", "tap0", SourceCheck::Off)
        .await
        .unwrap();
}

#[tokio::test]
async fn this_kernel_can_check_and_trying_leaves_nothing() {
    let _host = testing::Host::enter();
    try_source_check().await.unwrap();
    assert_eq!(
        testing::run("tc", &["filter", "show", "dev", "lo", "ingress"]),
        ""
    );
}
