//! Joins CNI's interface and the tap, both ways, with tc.
//!
//! Each gets an ingress qdisc with one filter that matches every packet and
//! redirects it to the egress of the other (`tc-mirred`). It runs before the
//! stack, so CNI's interface may keep its addresses: nothing that arrives
//! reaches them, and the guest may use the same ones.

use rtnetlink::{LinkUnspec, packet_route::tc::TcHandle};

use crate::{
    error::NetnsError,
    namespace::Netns,
    netlink::{Links, is, mtu_of},
    tap::set_sysctl,
};

/// `ffff:`, the handle of an ingress qdisc.
const INGRESS_QDISC: u32 = 0xffff_0000;

/// What the kernel would still send on its own from CNI's interface, as if it
/// were the pod: solicitations and duplicate address detection. And it shall
/// not answer ARP either, should the redirect ever be taken away.
const SILENCE: [(&str, &str, &str); 4] = [
    ("ipv6", "router_solicitations", "0"),
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "dad_transmits", "0"),
    ("ipv4", "arp_ignore", "8"),
];

/// Redirects all packets between `interface` and `tap`, and gives the tap the
/// interface's MTU. A redirect that is there already is replaced.
pub async fn redirect(netns: &Netns, interface: &str, tap: &str) -> Result<(), NetnsError> {
    let path = netns.path().to_owned();
    let (interface, tap) = (interface.to_owned(), tap.to_owned());
    netns
        .run(move || async move {
            let links = Links::connect(&path)?;
            let outer = links.find(&interface).await?;
            let inner = links.find(&tap).await?;
            let mtu = mtu_of(&outer).ok_or_else(|| NetnsError::Incomplete {
                interface: interface.clone(),
                netns: path.clone(),
                what: "MTU",
            })?;
            links
                .set(
                    &tap,
                    LinkUnspec::new_with_index(inner.header.index)
                        .mtu(mtu)
                        .build(),
                )
                .await?;
            for (family, key, value) in SILENCE {
                set_sysctl(&format!("net/{family}/conf/{interface}/{key}"), value)?;
            }
            one_way(&links, &tap, inner.header.index, outer.header.index).await?;
            one_way(&links, &interface, outer.header.index, inner.header.index).await
        })
        .await
}

async fn one_way(links: &Links, name: &str, from: u32, to: u32) -> Result<(), NetnsError> {
    let index = from.cast_signed();
    let mut qdiscs = links.handle.qdisc();

    let mut old = qdiscs.del(index);
    old.message_mut().header.parent = TcHandle::INGRESS;
    old.message_mut().header.handle = INGRESS_QDISC.into();
    match old.execute().await {
        Ok(()) => {}
        // There was none.
        Err(rtnetlink::Error::NetlinkError(error))
            if is(&error, libc::ENOENT) || is(&error, libc::EINVAL) => {}
        Err(source) => return Err(links.failed("clear the ingress qdisc of", name)(source)),
    }
    qdiscs
        .add(index)
        .ingress()
        .execute()
        .await
        .map_err(links.failed("add an ingress qdisc to", name))?;

    // The protocol travels in network byte order.
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    links
        .handle
        .traffic_filter(index)
        .add()
        .parent(INGRESS_QDISC)
        .protocol(every_protocol)
        .redirect(to)
        .map_err(links.failed("describe the redirect of", name))?
        .execute()
        .await
        .map_err(links.failed("redirect the packets of", name))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{ErrorKind, Read, Write},
        net::{IpAddr, Ipv4Addr, UdpSocket},
        num::NonZeroU32,
        os::fd::AsFd,
        time::{Duration, Instant},
    };

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::{create_tap, read_interface, testing};

    /// The virtio-net header before each frame, 10 bytes unless set otherwise.
    const VNET_HEADER: usize = 10;
    const ONE: NonZeroU32 = NonZeroU32::MIN;
    const ARP: u16 = 0x0806;
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;

    /// A guest with its NIC in the hands of the test.
    struct Guest {
        tap: File,
        tap_mac: [u8; 6],
        mac: [u8; 6],
    }

    impl Guest {
        fn send(&mut self, to: [u8; 6], ethertype: u16, payload: &[u8]) {
            let mut packet = vec![0; VNET_HEADER];
            packet.extend(to);
            packet.extend(self.mac);
            packet.extend(ethertype.to_be_bytes());
            packet.extend(payload);
            assert_eq!(self.tap.write(&packet).unwrap(), packet.len());
        }

        /// The next frame that `wanted` accepts of (ethertype, payload).
        fn receive(&mut self, wanted: impl Fn(u16, &[u8]) -> bool) -> Option<Vec<u8>> {
            // The bridge first makes sure of its own IPv6 address for a second.
            let deadline = Instant::now() + Duration::from_secs(8);
            let mut packet = vec![0; 65536];
            loop {
                match self.tap.read(&mut packet) {
                    Ok(length) => {
                        let frame = &packet[VNET_HEADER..length];
                        let ethertype = u16::from_be_bytes([frame[12], frame[13]]);
                        assert_ne!(frame[6..12], self.tap_mac, "the tap speaks itself");
                        if wanted(ethertype, &frame[14..]) {
                            return Some(frame[14..].to_vec());
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        let left = deadline.saturating_duration_since(Instant::now());
                        let mut fds = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
                        let left = PollTimeout::try_from(left).unwrap();
                        if poll(&mut fds, left).unwrap() == 0 {
                            return None;
                        }
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    fn arp(operation: u16, mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
        let mut packet = vec![0, 1, 8, 0, 6, 4];
        packet.extend(operation.to_be_bytes());
        packet.extend(mac);
        packet.extend(from.octets());
        packet.extend([0; 6]);
        packet.extend(to.octets());
        packet
    }

    #[tokio::test]
    async fn all_packets_go_to_the_guest_and_none_to_the_namespaces_own_stack() {
        let host = testing::Host::enter();
        let cni = testing::cni(&host);
        let netns = Netns::create(host.dir(), "pod").await.unwrap();
        let mut network = testing::bridge_network(&host);
        // CHECK of the others is broken for a pod like this one.
        network.plugins.truncate(1);
        let result = cni.add(&network, &testing::pod("p", &netns)).await.unwrap();
        let ips: Vec<IpAddr> = result.pod_ips().collect();
        let (IpAddr::V4(v4), IpAddr::V6(v6)) = (ips[0], ips[1]) else {
            panic!("{ips:?}");
        };
        let interface = read_interface(&netns, "eth0").await.unwrap();

        let mut taps = create_tap(&netns, "tap0", 65534, ONE).await.unwrap();
        redirect(&netns, "eth0", "tap0").await.unwrap();
        redirect(&netns, "eth0", "tap0").await.unwrap();
        let mut guest = Guest {
            tap: taps.remove(0).into(),
            tap_mac: read_interface(&netns, "tap0").await.unwrap().mac,
            mac: interface.mac,
        };
        let link = testing::ip(netns.path(), "link show tap0");
        assert!(
            link.contains("mtu 1400") && link.contains("NOARP,UP"),
            "{link}"
        );
        let addresses = testing::ip(netns.path(), "address show tap0");
        assert!(!addresses.contains("inet"), "{addresses}");

        // Out and back: the guest asks the gateway for its address.
        let gateway = Ipv4Addr::new(10, 88, 0, 1);
        guest.send([0xff; 6], ARP, &arp(1, interface.mac, v4, gateway));
        let reply = guest
            .receive(|ethertype, payload| ethertype == ARP && payload[7] == 2)
            .expect("an ARP reply");
        assert_eq!(reply[14..18], gateway.octets());
        let gateway_mac: [u8; 6] = reply[8..14].try_into().unwrap();

        // In: a datagram from the host arrives, and the namespace's kernel,
        // which has the address but no such port, does not refuse it.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect((v4, 4242)).unwrap();
        socket.send(b"hello").unwrap();
        // The gateway may first verify where the guest is.
        let to_guest =
            |ethertype: u16, payload: &[u8]| ethertype == IPV4 && payload[16..20] == v4.octets();
        let asked_or_sent = guest
            .receive(|ethertype, payload| {
                to_guest(ethertype, payload) || (ethertype == ARP && payload[7] == 1)
            })
            .expect("the datagram or an ARP request");
        let datagram = if asked_or_sent[0] >> 4 == 4 {
            asked_or_sent
        } else {
            guest.send(gateway_mac, ARP, &arp(2, interface.mac, v4, gateway));
            guest.receive(to_guest).expect("the datagram")
        };
        assert!(datagram.ends_with(b"hello"));
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let error = socket.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");

        // IPv6: the host's neighbour solicitation reaches the guest.
        let socket = UdpSocket::bind("[::]:0").unwrap();
        socket.send_to(b"hello", (v6, 4242)).unwrap();
        guest
            .receive(|ethertype, payload| {
                let solicitation = payload.len() >= 64 && payload[6] == 58 && payload[40] == 135;
                ethertype == IPV6 && solicitation && payload[48..64] == v6.octets()
            })
            .expect("a neighbour solicitation");

        // The addresses are still where the plugins put them.
        cni.check("p", "eth0").await.unwrap();
        assert_eq!(read_interface(&netns, "eth0").await.unwrap(), interface);

        // The tap goes with its descriptor, and can be made again.
        drop(guest);
        assert!(!testing::ip(netns.path(), "link").contains("tap0"));
        let four = NonZeroU32::new(4).unwrap();
        let again = create_tap(&netns, "tap0", 65534, four).await.unwrap();
        assert_eq!(again.len(), 4);
        redirect(&netns, "eth0", "tap0").await.unwrap();
        for queues in [ONE, four] {
            let taken = create_tap(&netns, "tap0", 65534, queues).await;
            let taken = taken.unwrap_err();
            assert!(matches!(taken, NetnsError::File { .. }), "{taken}");
        }
        drop(again);
        cni.del("p", "eth0").await.unwrap();
        assert!(!testing::ip(netns.path(), "link").contains("eth0"));
    }

    #[tokio::test]
    async fn a_missing_interface_is_named() {
        let host = testing::Host::enter();
        let netns = Netns::create(host.dir(), "pod").await.unwrap();
        let _tap = create_tap(&netns, "tap0", 0, ONE).await.unwrap();
        let error = redirect(&netns, "eth0", "tap0").await.unwrap_err();
        assert!(
            error.to_string().contains("interface eth0 is not in"),
            "{error}"
        );
        let error = create_tap(&netns, "a-name-too-long-", 0, ONE)
            .await
            .unwrap_err();
        assert!(matches!(error, NetnsError::InterfaceName { .. }));
    }
}
