//! A packet of the guest on its way to the tap.
//!
//! The header before it may ask for a checksum (virtio 1.2 §5.1.6.2.1), which
//! the node's kernel writes where the guest says, and after its filters have
//! looked at the packet. Anywhere else than into the checksum of a transport
//! header that would be a source address, a port or a neighbour's address that
//! nobody has checked, so such packets are not sent.

use std::io;

use virtio_bindings::virtio_net::VIRTIO_NET_HDR_F_NEEDS_CSUM;

use super::HEADER;
use super::tap::Tap;
use crate::devices::iov::Iov;

/// What is looked at of a packet, header included: the longest IPv4 header and
/// several extension headers of IPv6 fit.
const HEAD: usize = 256;

/// Headers of an IPv6 packet that are followed, as many as the node's filter
/// of what a pod sends follows.
const MAX_HEADERS: usize = 6;

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

const HOP_BY_HOP: u8 = 0;
const IGMP: u8 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;
const DESTINATION_OPTIONS: u8 = 60;

/// Sends `packet`, virtio-net header first.
///
/// The guest can change its memory at any time: what is judged is a copy, and
/// the copy is what is sent.
pub(super) fn send(mut packet: Iov<'_>, tap: &Tap) -> io::Result<usize> {
    let mut head = [0; HEAD];
    let count = packet.take(HEAD).copy_to(&mut head);
    let head = &mut head[..count];
    if !is_sound(head) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a checksum is asked for where there is none",
        ));
    }
    send_behind(head, packet, tap)
}

fn send_behind<'a>(head: &'a mut [u8], rest: Iov<'a>, tap: &Tap) -> io::Result<usize> {
    let mut whole = Iov::of(head);
    if !whole.extend(&rest) {
        return Err(io::ErrorKind::ArgumentListTooLong.into());
    }
    whole.write_to(tap)
}

/// Whether the checksum that is asked for, if any, is one of a transport
/// header, or lies deeper, in what a tunnel carries.
fn is_sound(head: &[u8]) -> bool {
    let Some((header, frame)) = head.split_at_checked(HEADER) else {
        return false;
    };
    if u32::from(header[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
        return true;
    }
    let number = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    // csum_start and csum_offset.
    let place = number(6) + number(8);
    checksum_from(frame).is_some_and(|from| place >= from)
}

/// Where the first checksum of `frame` may lie that is not IP's own.
fn checksum_from(frame: &[u8]) -> Option<usize> {
    let ip = frame.get(ETHERNET..)?;
    let (protocol, transport) = match u16::from_be_bytes([frame[12], frame[13]]) {
        IPV4 => ipv4(ip)?,
        IPV6 => ipv6(ip)?,
        ARP => return None,
        // Nothing that the node's kernel looks into.
        _ => return Some(ETHERNET),
    };
    let from = match protocol {
        Some(TCP) => transport + 16,
        Some(UDP) => transport + 6,
        Some(IGMP | ICMPV6) => return None,
        _ => transport,
    };
    Some(ETHERNET + from)
}

/// What the packet carries, if it begins with that, and where.
fn ipv4(ip: &[u8]) -> Option<(Option<u8>, usize)> {
    let fragment = u16::from_be_bytes([*ip.get(6)?, *ip.get(7)?]) & 0x1fff;
    let protocol = *ip.get(9)?;
    let length = usize::from(ip[0] & 0xf) * 4;
    Some(((fragment == 0).then_some(protocol), length))
}

fn ipv6(ip: &[u8]) -> Option<(Option<u8>, usize)> {
    let mut next = *ip.get(6)?;
    let mut at = 40;
    for _ in 0..MAX_HEADERS {
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                next = *ip.get(at)?;
                at += 8 * (1 + usize::from(*ip.get(at + 1)?));
            }
            FRAGMENT => {
                let offset = u16::from_be_bytes([*ip.get(at + 2)?, *ip.get(at + 3)?]) & 0xfff8;
                next = *ip.get(at)?;
                at += 8;
                if offset != 0 {
                    return Some((None, at));
                }
            }
            protocol => return Some((Some(protocol), at)),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet of an IPv4 or IPv6 header and what follows it.
    fn packet(ethertype: u16, ip: &[u8], start: u16, offset: u16) -> Vec<u8> {
        let mut packet = vec![0; HEADER];
        packet[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        packet[6..8].copy_from_slice(&start.to_le_bytes());
        packet[8..10].copy_from_slice(&offset.to_le_bytes());
        packet.extend([0xff; 12]);
        packet.extend(ethertype.to_be_bytes());
        packet.extend(ip);
        packet.extend([0; 60]);
        packet
    }

    fn v4(protocol: u8, words: u8) -> Vec<u8> {
        let mut ip = vec![0; usize::from(words) * 4];
        ip[0] = 0x40 | words;
        ip[9] = protocol;
        ip
    }

    fn v6(next: u8, then: &[u8]) -> Vec<u8> {
        let mut ip = vec![0; 40];
        ip[0] = 0x60;
        ip[6] = next;
        ip.extend(then);
        ip
    }

    #[test]
    fn checksums_of_transport_headers_and_deeper_ones_are_written() {
        for (what, ethertype, ip, start, offset) in [
            ("TCP", IPV4, v4(TCP, 5), 34, 16),
            ("UDP", IPV4, v4(UDP, 5), 34, 6),
            ("UDP behind options", IPV4, v4(UDP, 15), 74, 6),
            ("TCP in VXLAN", IPV4, v4(UDP, 5), 34 + 8 + 8 + 14 + 20, 16),
            ("TCP in IP in IP", IPV4, v4(4, 5), 34 + 20, 16),
            ("TCP/IPv6", IPV6, v6(TCP, &[]), 54, 16),
            ("UDP/IPv6", IPV6, v6(UDP, &[]), 54, 6),
            (
                "behind an extension",
                IPV6,
                v6(60, &[TCP, 0, 1, 4, 0, 0, 0, 0]),
                62,
                16,
            ),
            (
                "first fragment",
                IPV6,
                v6(44, &[UDP, 0, 0, 1, 0, 0, 0, 9]),
                62,
                6,
            ),
            ("an experiment's", 0x88b5, Vec::new(), 20, 6),
        ] {
            assert!(is_sound(&packet(ethertype, &ip, start, offset)), "{what}");
        }
    }

    #[test]
    fn nothing_else_is_written_over() {
        for (what, ethertype, ip, start, offset) in [
            ("the MAC", IPV4, v4(TCP, 5), 0, 6),
            ("the IPv4 source", IPV4, v4(TCP, 5), 22, 4),
            (
                "the IPv4 source, from the transport header",
                IPV4,
                v4(TCP, 15),
                34,
                4,
            ),
            ("a UDP port", IPV4, v4(UDP, 5), 34, 2),
            ("a TCP port", IPV4, v4(TCP, 5), 34, 2),
            ("an IGMP type", IPV4, v4(IGMP, 6), 38, 0),
            ("an ARP sender", ARP, Vec::new(), 20, 8),
            ("the IPv6 source", IPV6, v6(TCP, &[]), 20, 4),
            ("a neighbour's address", IPV6, v6(ICMPV6, &[]), 54, 16),
            (
                "one behind an extension",
                IPV6,
                v6(0, &[ICMPV6, 0, 5, 2, 0, 0, 0, 0]),
                62,
                16,
            ),
            (
                "an extension",
                IPV6,
                v6(60, &[TCP, 0, 1, 4, 0, 0, 0, 0]),
                54,
                0,
            ),
            (
                "too many extensions",
                IPV6,
                v6(60, &[60, 0, 0, 0, 0, 0, 0, 0].repeat(7)),
                150,
                16,
            ),
            (
                "beyond what is looked at",
                IPV6,
                v6(60, &[60, 200, 0, 0, 0, 0, 0, 0]),
                1700,
                16,
            ),
        ] {
            assert!(!is_sound(&packet(ethertype, &ip, start, offset)), "{what}");
            let mut unasked = packet(ethertype, &ip, start, offset);
            unasked[0] = 0;
            assert!(is_sound(&unasked), "{what}, not asked for");
        }
        assert!(!is_sound(&[1; HEADER + 5]));
        assert!(!is_sound(&[0; HEADER - 1]));
    }
}
