//! Joins CNI's interface and the tap, both ways, with tc.
//!
//! Each gets an ingress qdisc whose filter redirects packets to the egress of
//! the other (`tc-mirred`). It runs before the stack, so CNI's interface may
//! keep its addresses: nothing that arrives reaches them, and the guest may use
//! the same ones. What comes from CNI's interface is redirected whole; of what
//! the guest sends, that which passes the [source check](crate::SourceCheck),
//! and the rest is dropped.
//!
//! The tap is down until its filters are there: a frame that the guest sends
//! before is refused by the tap itself. The namespace's own stack sees none
//! from the guest at any time, and would forward none.

use rtnetlink::LinkUnspec;

use crate::{
    error::NetnsError,
    interface::{self, InterfaceConfig},
    namespace::Netns,
    netlink::Links,
    source_check::{MAX_INSTRUCTIONS, Program, Sender, SourceCheck},
    tap::set_sysctl,
    tc::Ingress,
};

/// What the kernel would still send on its own from CNI's interface, as if it
/// were the pod: solicitations and duplicate address detection. And it shall
/// not answer ARP either, should the redirect ever be taken away.
const SILENCE: [(&str, &str, &str); 4] = [
    ("ipv6", "router_solicitations", "0"),
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "dad_transmits", "0"),
    ("ipv4", "arp_ignore", "8"),
];

/// A new namespace takes over from the node that it forwards IPv4, and plugins
/// may turn it on.
const FORWARDING: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

/// Redirects packets between `interface` and `tap`, gives the tap the
/// interface's MTU, and brings it up. Returns how the guest's NIC is to be set
/// up; with [`SourceCheck::On`] the guest can speak in no other way. A redirect
/// that is there already is replaced.
///
/// Fails with [`NetnsError::NoClassifier`] where the node's kernel cannot check
/// what the guest sends.
pub async fn redirect(
    netns: &Netns,
    interface: &str,
    tap: &str,
    check: SourceCheck,
) -> Result<InterfaceConfig, NetnsError> {
    let path = netns.path().to_owned();
    let (interface, tap) = (interface.to_owned(), tap.to_owned());
    netns
        .run(move || async move {
            let links = Links::connect(&path)?;
            let outer = links.find(&interface).await?;
            let inner = links.find(&tap).await?.header.index;
            let config = interface::read(&links, &interface, &outer).await?;
            let outer = outer.header.index;
            for (family, key, value) in SILENCE {
                set_sysctl(&format!("net/{family}/conf/{interface}/{key}"), value)?;
            }
            for key in FORWARDING {
                set_sysctl(key, "0")?;
            }
            let down = LinkUnspec::new_with_index(inner).mtu(config.mtu).down();
            links.set(&tap, down.build()).await?;
            let from_guest = Ingress::renew(&links, &tap, inner).await?;
            match check {
                SourceCheck::Off => from_guest.redirect_all(outer).await?,
                SourceCheck::On => {
                    let program = Sender::of(&config).program();
                    if program.len() > MAX_INSTRUCTIONS {
                        return Err(NetnsError::TooManyAddresses {
                            interface,
                            netns: path,
                            count: config.addresses.len(),
                        });
                    }
                    from_guest.redirect_matches(&program, outer).await?;
                }
            }
            let up = LinkUnspec::new_with_index(inner).up();
            links.set(&tap, up.build()).await?;
            let to_guest = Ingress::renew(&links, &interface, outer).await?;
            to_guest.redirect_all(inner).await?;
            Ok(config)
        })
        .await
}

/// Whether the node's kernel can check what guests send: tries it in a network
/// namespace of its own. Fails as [`redirect`] would.
pub async fn try_source_check() -> Result<(), NetnsError> {
    Netns::run_in_nameless(|path| async move {
        const LOOPBACK: &str = "lo";
        let links = Links::connect(&path)?;
        let index = links.find(LOOPBACK).await?.header.index;
        let ingress = Ingress::renew(&links, LOOPBACK, index).await?;
        ingress.redirect_matches(&Program::drop_all(), index).await
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::{
        io::ErrorKind,
        net::{IpAddr, Ipv4Addr, UdpSocket},
        num::NonZeroU32,
        time::Duration,
    };

    use super::*;
    use crate::{
        create_tap, read_interface, testing,
        testing::guest::{ARP, Guest, IPV4, IPV6, arp},
    };

    const ONE: NonZeroU32 = NonZeroU32::MIN;

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
        for check in [SourceCheck::Off, SourceCheck::On] {
            let given = redirect(&netns, "eth0", "tap0", check).await.unwrap();
            assert_eq!(given, interface);
        }
        let mut guest = Guest::on(&netns, taps.remove(0), interface.mac).await;
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
        redirect(&netns, "eth0", "tap0", SourceCheck::On)
            .await
            .unwrap();
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
        let error = redirect(&netns, "eth0", "tap0", SourceCheck::On)
            .await
            .unwrap_err();
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
