//! What a guest may send: frames that say who sent them by the pod's own MAC
//! and addresses, and nothing that only a router or a DHCP server says.
//!
//! A container that shares the node's kernel needs NET_RAW to forge a frame. A
//! guest has a kernel of its own and can send any; so the tap is where it is
//! held to what it was given:
//!
//! ```text
//! every frame   no VLAN tag, the MAC as its source
//! IPv4          source: an address of the pod; no IGMP query, nothing to
//!               UDP port 68 (DHCP clients)
//! ARP           sender: the MAC and an address of the pod, or a probe by nobody
//! IPv6          source: an address of the pod, or the link-local one that
//!               follows from the MAC; `::` for duplicate address detection and
//!               multicast reports alone; no router advertisement, redirect or
//!               multicast query; neighbour discovery about the pod's own
//!               addresses and MAC; nothing to UDP port 546 (DHCP clients)
//! others        none: no STP, LLDP, 802.1Q, PPPoE, ...
//! ```
//!
//! A pod to which the plugins gave no IPv6 address may make its own of what
//! routers advertise: any prefix with the MAC's interface identifier, which no
//! neighbour has.
//!
//! It is a program of classic BPF for tc's `bpf` classifier: that is in the
//! kernels of the field as `flower` is not, needs neither bpf(2) nor its
//! capabilities, and a program can follow IPv6 extension headers. It says what
//! may pass, not what may not: a program that reads beyond the frame ends with
//! "no match". tc shows it as `bytecode`, and counts what was dropped in the
//! statistics of the tap's ingress qdisc.
//!
//! The source's bytes are as the guest sent them when the program sees them.
//! The kernel writes into a frame later only where its virtio-net header asks
//! for a checksum; the monitor sees to it that this is no place looked at here.

mod bpf;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(crate) use bpf::Program;
use bpf::{At, Label, Size, Slot};

use crate::interface::InterfaceConfig;

/// Whether a guest is held to the addresses it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceCheck {
    On,
    /// It may send whatever it likes: a router, a VPN gateway, a pod with
    /// addresses of its own.
    Off,
}

/// `BPF_MAXINSNS`. Some two hundred addresses fit.
pub(crate) const MAX_INSTRUCTIONS: usize = 4096;

const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_ARP: u32 = 0x0806;
const ETHERTYPE_IPV6: u32 = 0x86dd;

const IGMP: u32 = 2;
const UDP: u32 = 17;
const ICMPV6: u32 = 58;
const HOP_BY_HOP: u32 = 0;
const ROUTING: u32 = 43;
const FRAGMENT: u32 = 44;
const DESTINATION_OPTIONS: u32 = 60;

const IGMP_QUERY: u32 = 0x11;
const MLD_QUERY: u32 = 130;
const MLD_REPORT: u32 = 131;
const MLD2_REPORT: u32 = 143;
const ROUTER_SOLICITATION: u32 = 133;
const ROUTER_ADVERTISEMENT: u32 = 134;
const NEIGHBOUR_SOLICITATION: u32 = 135;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const REDIRECT: u32 = 137;
const SOURCE_LINK_ADDRESS: u32 = 1;
const TARGET_LINK_ADDRESS: u32 = 2;

/// Whatever comes there comes from a DHCP server. Its own port says nothing:
/// clients look at theirs alone.
const DHCP_CLIENT: u32 = 68;
const DHCPV6_CLIENT: u32 = 546;

// Where things are in a frame.
const SOURCE_MAC: u32 = 6;
const ETHERTYPE: u32 = 12;
const IP: u32 = 14;
const IPV6_PAYLOAD_LENGTH: u32 = IP + 4;
const IPV6_NEXT: u32 = IP + 6;
const IPV6_SOURCE: u32 = IP + 8;
const IPV6_PAYLOAD: u32 = IP + 40;
const ND_TARGET: u32 = IPV6_PAYLOAD + 8;
const ND_OPTIONS: u32 = ND_TARGET + 16;
const RS_OPTIONS: u32 = IPV6_PAYLOAD + 8;

/// Headers that are followed in an IPv6 packet, up to what it carries: as many
/// as there are in the order of RFC 8200, section 4.1.
const MAX_HEADERS: usize = 6;

/// Options of a neighbour discovery message: one is usual, a nonce is another.
const MAX_OPTIONS: usize = 4;

/// As whom a guest may speak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sender {
    mac: [u8; 6],
    ipv4: Vec<Ipv4Addr>,
    ipv6: Vec<Ipv6Addr>,
}

impl Sender {
    pub(crate) fn of(interface: &InterfaceConfig) -> Self {
        let mut sender = Self {
            mac: interface.mac,
            ipv4: Vec::new(),
            ipv6: Vec::new(),
        };
        for address in &interface.addresses {
            match address.addr() {
                IpAddr::V4(address) => sender.ipv4.push(address),
                IpAddr::V6(address) => sender.ipv6.push(address),
            }
        }
        sender
    }

    /// Matches what it may send.
    pub(crate) fn program(&self) -> Program {
        let mut p = Program::default();
        p.load_vlan_present();
        p.need(0);
        self.need_mac(&mut p, At::Frame(SOURCE_MAC), At::Frame(SOURCE_MAC + 4));
        let [mut ipv4, mut ipv6] = <[Label; 2]>::default();
        p.load(Size::Half, At::Frame(ETHERTYPE));
        p.jump_if(ETHERTYPE_IPV4, &mut ipv4);
        p.jump_if(ETHERTYPE_IPV6, &mut ipv6);
        p.need(ETHERTYPE_ARP);
        self.arp(&mut p);
        p.place(ipv4);
        self.ipv4(&mut p);
        p.place(ipv6);
        self.ipv6(&mut p);
        p
    }

    /// The first four bytes, and the last two.
    fn need_mac(&self, p: &mut Program, first: At, last: At) {
        let [a, b, c, d, e, f] = self.mac;
        p.load(Size::Word, first);
        p.need(u32::from_be_bytes([a, b, c, d]));
        p.load(Size::Half, last);
        p.need(u32::from(u16::from_be_bytes([e, f])));
    }

    /// RFC 826, and the probes of RFC 5227.
    fn arp(&self, p: &mut Program) {
        const REQUEST: u32 = 1;
        const REPLY: u32 = 2;
        // Ethernet and IPv4, of 6 and 4 bytes.
        p.load(Size::Word, At::Frame(IP));
        p.need(0x0001_0800);
        p.load(Size::Half, At::Frame(IP + 4));
        p.need(0x0604);
        self.need_mac(p, At::Frame(IP + 8), At::Frame(IP + 12));
        let [mut own, mut request] = <[Label; 2]>::default();
        p.load(Size::Word, At::Frame(IP + 14));
        for address in &self.ipv4 {
            p.jump_if(address.to_bits(), &mut own);
        }
        p.need(Ipv4Addr::UNSPECIFIED.to_bits());
        p.load(Size::Half, At::Frame(IP + 6));
        p.need(REQUEST);
        p.matched();
        p.place(own);
        p.load(Size::Half, At::Frame(IP + 6));
        p.jump_if(REQUEST, &mut request);
        p.need(REPLY);
        p.place(request);
        p.matched();
    }

    fn ipv4(&self, p: &mut Program) {
        let [mut own, mut pass, mut igmp, mut udp] = <[Label; 4]>::default();
        p.load(Size::Word, At::Frame(IP + 12));
        for address in &self.ipv4 {
            p.jump_if(address.to_bits(), &mut own);
        }
        p.no_match();
        p.place(own);
        // What it carries begins in the first fragment.
        p.load(Size::Half, At::Frame(IP + 6));
        p.jump_if_any_bit(0x1fff, &mut pass);
        p.index_ipv4_length(IP);
        p.load(Size::Byte, At::Frame(IP + 9));
        p.jump_if(UDP, &mut udp);
        p.jump_if(IGMP, &mut igmp);
        p.place(pass);
        p.matched();
        p.place(udp);
        p.load(Size::Half, At::Index(IP + 2));
        p.refuse(DHCP_CLIENT);
        p.matched();
        p.place(igmp);
        p.load(Size::Byte, At::Index(IP));
        p.refuse(IGMP_QUERY);
        p.matched();
    }

    fn ipv6(&self, p: &mut Program) {
        let [mut own, mut nobody] = <[Label; 2]>::default();
        self.jump_if_own(p, IPV6_SOURCE, &mut own);
        p.jump_if_words(IPV6_SOURCE, &[0; 4], &mut nobody);
        p.no_match();
        p.place(own);
        let [mut pass, mut icmp] = <[Label; 2]>::default();
        follow_extensions(p, &mut pass, &mut icmp);
        p.place(pass);
        p.matched();

        // X points at the message.
        let [mut router, mut about_neighbour, mut about_itself] = <[Label; 3]>::default();
        p.place(icmp);
        p.load(Size::Byte, At::Index(0));
        for kind in [ROUTER_ADVERTISEMENT, REDIRECT, MLD_QUERY] {
            p.refuse(kind);
        }
        p.jump_if(ROUTER_SOLICITATION, &mut router);
        p.jump_if(NEIGHBOUR_SOLICITATION, &mut about_neighbour);
        p.jump_if(NEIGHBOUR_ADVERTISEMENT, &mut about_itself);
        p.matched();

        let [mut options, mut report, mut target] = <[Label; 3]>::default();
        p.place(router);
        need_no_extension(p);
        p.set_index(RS_OPTIONS);
        p.jump(&mut options);
        p.place(about_neighbour);
        need_no_extension(p);
        p.set_index(ND_OPTIONS);
        p.jump(&mut options);
        p.place(about_itself);
        need_no_extension(p);
        p.jump(&mut target);

        // From `::`: is this address taken? And reports of what it listens
        // to, which carry a router alert before them (RFC 3590).
        p.place(nobody);
        p.load(Size::Byte, At::Frame(IPV6_NEXT));
        p.jump_if(HOP_BY_HOP, &mut report);
        p.need(ICMPV6);
        p.load(Size::Byte, At::Frame(IPV6_PAYLOAD));
        p.need(NEIGHBOUR_SOLICITATION);
        p.place(target);
        let mut own = Label::default();
        self.jump_if_own(p, ND_TARGET, &mut own);
        p.no_match();
        p.place(own);
        p.set_index(ND_OPTIONS);
        p.place(options);
        self.need_own_link_address(p);

        p.place(report);
        // ICMPv6 follows, after 8 bytes.
        p.load(Size::Half, At::Frame(IPV6_PAYLOAD));
        p.need(ICMPV6 << 8);
        let mut first = Label::default();
        p.load(Size::Byte, At::Frame(IPV6_PAYLOAD + 8));
        p.jump_if(MLD_REPORT, &mut first);
        p.need(MLD2_REPORT);
        p.place(first);
        p.matched();
    }

    /// Jumps if one of the pod's addresses is there.
    fn jump_if_own(&self, p: &mut Program, at: u32, to: &mut Label) {
        let [a, b, c, d, e, f] = self.mac;
        // RFC 4291, appendix A.
        let identifier = [
            u32::from_be_bytes([a ^ 2, b, c, 0xff]),
            u32::from_be_bytes([0xfe, d, e, f]),
        ];
        if self.ipv6.is_empty() {
            p.jump_if_words(at + 8, &identifier, to);
            return;
        }
        let link_local = [0xfe80_0000, 0, identifier[0], identifier[1]];
        p.jump_if_words(at, &link_local, to);
        for address in &self.ipv6 {
            let bits = address.to_bits();
            let words = [96, 64, 32, 0].map(|shift| (bits >> shift) as u32);
            p.jump_if_words(at, &words, to);
        }
    }

    /// Matches unless an option of the message, from X on, has another link
    /// address than the pod's.
    fn need_own_link_address(&self, p: &mut Program) {
        let mut over = Label::default();
        p.load(Size::Half, At::Frame(IPV6_PAYLOAD_LENGTH));
        p.add(IPV6_PAYLOAD);
        p.store(Slot::End);
        for _ in 0..MAX_OPTIONS {
            let [mut link_address, mut next] = <[Label; 2]>::default();
            p.load_slot(Slot::End);
            p.jump_up_to_index(&mut over);
            p.load(Size::Byte, At::Index(0));
            p.jump_if(SOURCE_LINK_ADDRESS, &mut link_address);
            p.jump_if(TARGET_LINK_ADDRESS, &mut link_address);
            p.jump(&mut next);
            p.place(link_address);
            p.load(Size::Byte, At::Index(1));
            p.need(1);
            self.need_mac(p, At::Index(2), At::Index(6));
            p.place(next);
            p.load(Size::Byte, At::Index(1));
            p.refuse(0);
            p.shift_left(3);
            p.add_index();
            p.move_to_index();
        }
        p.load_slot(Slot::End);
        p.jump_up_to_index(&mut over);
        p.no_match();
        p.place(over);
        p.matched();
    }
}

/// Leads to `icmp` with X at the message, or to `pass`; does not go on behind.
fn follow_extensions(p: &mut Program, pass: &mut Label, icmp: &mut Label) {
    let mut udp = Label::default();
    p.set_index(IPV6_PAYLOAD);
    p.load(Size::Byte, At::Frame(IPV6_NEXT));
    for _ in 0..MAX_HEADERS {
        let [mut extension, mut fragment, mut next] = <[Label; 3]>::default();
        p.jump_if(ICMPV6, icmp);
        p.jump_if(UDP, &mut udp);
        p.jump_if(HOP_BY_HOP, &mut extension);
        p.jump_if(ROUTING, &mut extension);
        p.jump_if(DESTINATION_OPTIONS, &mut extension);
        p.jump_if(FRAGMENT, &mut fragment);
        p.jump(pass);

        p.place(fragment);
        // What it carries begins in the first one.
        p.load(Size::Half, At::Index(2));
        p.jump_if_any_bit(0xfff8, pass);
        p.load(Size::Byte, At::Index(0));
        p.store(Slot::Header);
        p.load_index();
        p.add(8);
        p.move_to_index();
        p.load_slot(Slot::Header);
        p.jump(&mut next);

        p.place(extension);
        p.load(Size::Byte, At::Index(0));
        p.store(Slot::Header);
        p.load(Size::Byte, At::Index(1));
        p.add(1);
        p.shift_left(3);
        p.add_index();
        p.move_to_index();
        p.load_slot(Slot::Header);
        p.place(next);
    }
    p.no_match();

    p.place(udp);
    p.load(Size::Half, At::Index(2));
    p.refuse(DHCPV6_CLIENT);
    p.matched();
}

/// Neighbour discovery has none that a neighbour would heed (RFC 6980 for
/// fragments), and what is checked next is at a fixed place.
fn need_no_extension(p: &mut Program) {
    p.load_index();
    p.need(IPV6_PAYLOAD);
}

#[cfg(test)]
mod tests;
