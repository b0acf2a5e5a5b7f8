//! Packets of a pod that has these addresses, and of one that claims others'.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::testing::guest::{IPV4, IPV6, frame};

pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];
pub(super) const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 6];
pub(super) const ALL: [u8; 6] = [0xff; 6];
pub(super) const V4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 5);
pub(super) const SECOND_V4: Ipv4Addr = Ipv4Addr::new(10, 200, 3, 7);
pub(super) const OTHER_V4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 6);
pub(super) const V6: &str = "fd00:9::5";
pub(super) const OTHER_V6: &str = "fd00:9::6";
pub(super) const LINK_LOCAL: &str = "fe80::ff:fe00:5";
pub(super) const SLAAC: &str = "2001:db8:1:2:0:ff:fe00:5";
pub(super) const BOTH: &[&str] = &["10.9.0.5/24", "10.200.3.7/32", "fd00:9::5/64"];
pub(super) fn ipv4(source: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0];
    let length = u16::try_from(20 + payload.len()).unwrap();
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet.extend(source.octets());
    packet.extend(OTHER_V4.octets());
    packet.extend(payload);
    packet
}

pub(super) fn from_v4(source: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    frame(ALL, MAC, IPV4, &ipv4(source, protocol, payload))
}

pub(super) fn from_v6(source: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 255];
    let length = u16::try_from(payload.len()).unwrap();
    packet[4..6].copy_from_slice(&length.to_be_bytes());
    packet.extend(source.parse::<Ipv6Addr>().unwrap().octets());
    packet.extend("ff02::1".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(payload);
    frame(ALL, MAC, IPV6, &packet)
}

pub(super) fn udp(from: u16, to: u16) -> Vec<u8> {
    let mut datagram = [from.to_be_bytes(), to.to_be_bytes(), [0, 12], [0, 0]].concat();
    datagram.extend([2; 4]);
    datagram
}

pub(super) const TCP: &[u8] = &[
    0x80, 0, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0,
];

pub(super) fn link_option(kind: u8, mac: [u8; 6]) -> Vec<u8> {
    [&[kind, 1], &mac[..]].concat()
}

/// A message about a neighbour: the target, then options.
pub(super) fn nd(kind: u8, target: &str, options: &[u8]) -> Vec<u8> {
    let target = target.parse::<Ipv6Addr>().unwrap().octets();
    [&[kind, 0, 0, 0, 0, 0, 0, 0], &target[..], options].concat()
}

pub(super) fn icmp(kind: u8, rest: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0, 0, 0, 0], rest].concat()
}

/// An extension header of 8 bytes before `payload`.
pub(super) fn behind(next: u8, payload: &[u8]) -> Vec<u8> {
    [&[next, 0, 1, 4, 0, 0, 0, 0], payload].concat()
}

/// A part of a packet, at `offset` in units of 8 bytes.
pub(super) fn fragment(next: u8, offset: u16, payload: &[u8]) -> Vec<u8> {
    let offset = (offset << 3 | 1).to_be_bytes();
    [&[next, 0, offset[0], offset[1], 0, 0, 0, 1], payload].concat()
}

pub(super) fn ipv4_with(
    source: Ipv4Addr,
    protocol: u8,
    payload: &[u8],
    edit: impl Fn(&mut Vec<u8>),
) -> Vec<u8> {
    let mut packet = ipv4(source, protocol, payload);
    edit(&mut packet);
    frame(ALL, MAC, IPV4, &packet)
}
