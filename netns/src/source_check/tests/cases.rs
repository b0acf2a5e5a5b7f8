//! What passes and what does not, frame by frame.

use std::net::Ipv4Addr;

use super::packets::*;
use crate::testing::guest::{ARP, IPV4, IPV6, arp, frame};

pub(super) type Case = (&'static str, Vec<u8>);

pub(super) fn what_a_pod_sends() -> Vec<Case> {
    let own = link_option(1, MAC);
    let target_own = link_option(2, MAC);
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    vec![
        ("TCP", from_v4(V4, 6, TCP)),
        ("its second address", from_v4(SECOND_V4, 6, TCP)),
        ("ping", from_v4(V4, 1, &icmp(8, b"ping"))),
        ("UDP", from_v4(V4, 17, &udp(68, 67))),
        ("a DHCP relay", from_v4(V4, 17, &udp(67, 67))),
        (
            "a TCP port 68",
            from_v4(V4, 6, &[0x80, 0, 0, 68, 0, 0, 0, 0, 0, 0, 0, 0]),
        ),
        (
            "a later fragment with the bytes of port 68",
            ipv4_with(V4, 17, &udp(67, 68), |packet| packet[7] = 2),
        ),
        ("IGMP report", from_v4(V4, 2, &icmp(0x22, &[]))),
        (
            "ARP request",
            frame(ALL, MAC, ARP, &arp(1, MAC, V4, OTHER_V4)),
        ),
        (
            "ARP reply",
            frame(ALL, MAC, ARP, &arp(2, MAC, SECOND_V4, OTHER_V4)),
        ),
        (
            "ARP announcement",
            frame(ALL, MAC, ARP, &arp(1, MAC, V4, V4)),
        ),
        (
            "ARP probe",
            frame(ALL, MAC, ARP, &arp(1, MAC, Ipv4Addr::UNSPECIFIED, V4)),
        ),
        ("TCP/IPv6", from_v6(V6, 6, TCP)),
        ("TCP from link-local", from_v6(LINK_LOCAL, 6, TCP)),
        ("UDP/IPv6", from_v6(LINK_LOCAL, 17, &udp(546, 547))),
        ("behind an extension", from_v6(V6, 60, &behind(6, TCP))),
        (
            "UDP behind two",
            from_v6(V6, 0, &behind(43, &behind(17, &udp(1, 2)))),
        ),
        (
            "first fragment",
            from_v6(V6, 44, &fragment(17, 0, &udp(1, 2))),
        ),
        (
            "a later fragment with the bytes of an advertisement",
            from_v6(V6, 44, &fragment(58, 3, &icmp(134, &[]))),
        ),
        ("IPsec", from_v6(V6, 50, TCP)),
        ("ping6", from_v6(V6, 58, &icmp(128, b"ping"))),
        ("solicitation", from_v6(V6, 58, &nd(135, OTHER_V6, &own))),
        (
            "solicitation without option",
            from_v6(LINK_LOCAL, 58, &nd(135, OTHER_V6, &[])),
        ),
        ("is it taken?", from_v6("::", 58, &nd(135, V6, &nonce))),
        (
            "is the link-local one taken?",
            from_v6("::", 58, &nd(135, LINK_LOCAL, &[])),
        ),
        ("advertisement", from_v6(V6, 58, &nd(136, V6, &target_own))),
        (
            "advertisement with a nonce",
            from_v6(
                V6,
                58,
                &nd(136, LINK_LOCAL, &[&nonce[..], &target_own].concat()),
            ),
        ),
        (
            "router solicitation",
            from_v6(LINK_LOCAL, 58, &icmp(133, &own)),
        ),
        (
            "bare router solicitation",
            from_v6(LINK_LOCAL, 58, &icmp(133, &[])),
        ),
        (
            "MLD report",
            from_v6(LINK_LOCAL, 0, &behind(58, &icmp(143, &[0; 20]))),
        ),
        (
            "MLD report by nobody",
            from_v6("::", 0, &behind(58, &icmp(143, &[0; 20]))),
        ),
        (
            "MLDv1 report by nobody",
            from_v6("::", 0, &behind(58, &icmp(131, &[0; 16]))),
        ),
    ]
}

pub(super) fn what_it_does_not_send() -> Vec<Case> {
    let other = link_option(1, OTHER_MAC);
    let target_other = link_option(2, OTHER_MAC);
    let tagged = |tag: u16| {
        let inner = [&[0, 7, 8, 0], &ipv4(V4, 6, TCP)[..]].concat();
        frame(ALL, MAC, tag, &inner)
    };
    let twice_tagged = [&[0, 7, 0x81, 0, 0, 8, 8, 0], &ipv4(V4, 6, TCP)[..]].concat();
    let arp_with = |at: usize, value: u8| {
        let mut packet = arp(1, MAC, V4, OTHER_V4);
        packet[at] = value;
        frame(ALL, MAC, ARP, &packet)
    };
    let many = |count: usize, last: &[u8]| {
        (0..count).fold(last.to_vec(), |inner, i| {
            behind(if i == 0 { 58 } else { 60 }, &inner)
        })
    };
    let from = |source: [u8; 4]| from_v4(Ipv4Addr::from(source), 6, TCP);
    let nonces = [14, 1, 1, 2, 3, 4, 5, 6].repeat(4);
    vec![
        (
            "a foreign MAC",
            frame(ALL, OTHER_MAC, IPV4, &ipv4(V4, 6, TCP)),
        ),
        (
            "a foreign MAC's ARP",
            frame(ALL, OTHER_MAC, ARP, &arp(1, MAC, V4, OTHER_V4)),
        ),
        ("802.1Q", tagged(0x8100)),
        ("802.1ad", tagged(0x88a8)),
        ("tags in tags", frame(ALL, MAC, 0x88a8, &twice_tagged)),
        (
            "priority tag",
            frame(
                ALL,
                MAC,
                0x8100,
                &[&[0xe0, 0, 8, 0], &ipv4(V4, 6, TCP)[..]].concat(),
            ),
        ),
        (
            "STP",
            frame(ALL, MAC, 38, &[&[0x42, 0x42, 3], &[0; 43][..]].concat()),
        ),
        ("LLDP", frame(ALL, MAC, 0x88cc, &[0; 46])),
        ("PPPoE", frame(ALL, MAC, 0x8863, &[0; 46])),
        ("RARP", frame(ALL, MAC, 0x8035, &arp(3, MAC, V4, V4))),
        ("MPLS", frame(ALL, MAC, 0x8847, &[0; 46])),
        ("a foreign IPv4 address", from_v4(OTHER_V4, 6, TCP)),
        ("no IPv4 address", from([0, 0, 0, 0])),
        ("loopback", from([127, 0, 0, 1])),
        ("IPv4 multicast", from([224, 0, 0, 1])),
        ("IPv4 broadcast", from([255, 255, 255, 255])),
        (
            "IPv4 without a header",
            frame(ALL, MAC, IPV4, &[0x45, 0, 0, 20]),
        ),
        (
            "a foreign later fragment",
            ipv4_with(OTHER_V4, 6, TCP, |packet| packet[7] = 2),
        ),
        ("DHCP reply", from_v4(V4, 17, &udp(67, 68))),
        ("DHCP reply from any port", from_v4(V4, 17, &udp(40000, 68))),
        (
            "DHCP reply in fragments",
            ipv4_with(V4, 17, &udp(67, 68), |packet| packet[6] = 0x20),
        ),
        (
            "DHCP reply behind options",
            ipv4_with(
                V4,
                17,
                &[&[1, 1, 1, 0], &udp(67, 68)[..]].concat(),
                |packet| packet[0] = 0x46,
            ),
        ),
        ("UDP without a header", from_v4(V4, 17, &[])),
        ("IGMP query", from_v4(V4, 2, &icmp(0x11, &[]))),
        (
            "ARP of a foreign address",
            frame(ALL, MAC, ARP, &arp(1, MAC, OTHER_V4, V4)),
        ),
        (
            "ARP reply of a foreign address",
            frame(ALL, MAC, ARP, &arp(2, MAC, OTHER_V4, V4)),
        ),
        (
            "ARP of a foreign MAC",
            frame(ALL, MAC, ARP, &arp(2, OTHER_MAC, V4, OTHER_V4)),
        ),
        (
            "a probe that is a reply",
            frame(ALL, MAC, ARP, &arp(2, MAC, Ipv4Addr::UNSPECIFIED, V4)),
        ),
        ("ARP of other hardware", arp_with(1, 6)),
        ("ARP of another protocol", arp_with(3, 1)),
        ("ARP of another length", arp_with(4, 8)),
        ("ARP of another kind", arp_with(7, 3)),
        (
            "ARP cut short",
            frame(ALL, MAC, ARP, &arp(1, MAC, V4, OTHER_V4)[..12]),
        ),
        ("a foreign IPv6 address", from_v6(OTHER_V6, 6, TCP)),
        (
            "a foreign link-local address",
            from_v6("fe80::ff:fe00:6", 6, TCP),
        ),
        ("an address of another prefix", from_v6(SLAAC, 6, TCP)),
        (
            "an IPv4 address in IPv6",
            from_v6("::ffff:10.9.0.5", 6, TCP),
        ),
        ("IPv6 multicast", from_v6("ff02::1", 6, TCP)),
        ("IPv6 loopback", from_v6("::1", 6, TCP)),
        ("TCP by nobody", from_v6("::", 6, TCP)),
        ("ping by nobody", from_v6("::", 58, &icmp(128, &[0; 20]))),
        (
            "IPv6 without a header",
            frame(ALL, MAC, IPV6, &[0x60, 0, 0, 0]),
        ),
        (
            "router advertisement",
            from_v6(LINK_LOCAL, 58, &icmp(134, &[0; 8])),
        ),
        (
            "router advertisement behind an extension",
            from_v6(LINK_LOCAL, 0, &many(1, &icmp(134, &[]))),
        ),
        (
            "router advertisement behind three",
            from_v6(LINK_LOCAL, 60, &many(3, &icmp(134, &[]))),
        ),
        (
            "router advertisement behind a long one",
            from_v6(
                LINK_LOCAL,
                60,
                &[&[58, 2], &[0; 22][..], &icmp(134, &[])].concat(),
            ),
        ),
        (
            "router advertisement in fragments",
            from_v6(LINK_LOCAL, 44, &fragment(58, 0, &icmp(134, &[]))),
        ),
        (
            "first fragment that hides what it is",
            from_v6(V6, 44, &fragment(60, 0, &[])),
        ),
        (
            "more extensions than there are",
            from_v6(V6, 60, &many(6, &icmp(128, &[]))),
        ),
        ("redirect", from_v6(LINK_LOCAL, 58, &icmp(137, &[0; 32]))),
        (
            "MLD query",
            from_v6(LINK_LOCAL, 0, &behind(58, &icmp(130, &[0; 16]))),
        ),
        (
            "MLD query by nobody",
            from_v6("::", 0, &behind(58, &icmp(130, &[0; 16]))),
        ),
        (
            "router advertisement by nobody",
            from_v6("::", 58, &icmp(134, &[0; 16])),
        ),
        ("DHCPv6 reply", from_v6(LINK_LOCAL, 17, &udp(547, 546))),
        (
            "DHCPv6 reply behind an extension",
            from_v6(LINK_LOCAL, 60, &behind(17, &udp(547, 546))),
        ),
        (
            "advertisement of a foreign address",
            from_v6(V6, 58, &nd(136, OTHER_V6, &[])),
        ),
        (
            "advertisement of a foreign MAC",
            from_v6(V6, 58, &nd(136, V6, &target_other)),
        ),
        (
            "advertisement behind an extension",
            from_v6(V6, 60, &behind(58, &nd(136, OTHER_V6, &[]))),
        ),
        (
            "solicitation of a foreign MAC",
            from_v6(V6, 58, &nd(135, OTHER_V6, &other)),
        ),
        (
            "solicitation of a second, foreign MAC",
            from_v6(
                V6,
                58,
                &nd(
                    135,
                    OTHER_V6,
                    &[link_option(1, MAC), other.clone()].concat(),
                ),
            ),
        ),
        (
            "claiming that a foreign address is taken",
            from_v6("::", 58, &nd(135, OTHER_V6, &[])),
        ),
        (
            "router solicitation of a foreign MAC",
            from_v6(LINK_LOCAL, 58, &icmp(133, &other)),
        ),
        (
            "an option without length",
            from_v6(V6, 58, &nd(135, OTHER_V6, &[14, 0, 0, 0, 0, 0, 0, 0])),
        ),
        (
            "a long link address",
            from_v6(
                V6,
                58,
                &nd(135, OTHER_V6, &[&[1, 2], &[0; 14][..]].concat()),
            ),
        ),
        (
            "a foreign MAC behind many options",
            from_v6(V6, 58, &nd(135, OTHER_V6, &[nonces, other].concat())),
        ),
    ]
}
