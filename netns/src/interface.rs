//! Reads what CNI plugins gave an interface, for the guest to take over.
//!
//! The kernel is asked rather than the CNI result: plugins may add routes or
//! change the MTU without saying so.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::{
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags,
        RouteProtocol, RouteType, RouteVia,
    },
};
use serde::{Deserialize, Serialize};

use crate::{
    error::NetnsError,
    namespace::Netns,
    netlink::{Links, check_interface_name, mtu_of},
};

/// An interface as the guest's NIC should be configured. Applied in order to
/// an interface that is up, without duplicate address detection, it yields the
/// routing of the namespace it was read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceConfig {
    pub mac: [u8; 6],
    pub mtu: u32,
    /// Addresses of global scope, both families. One without a connected route
    /// in the namespace has a full-length prefix here, so that the guest's
    /// kernel makes none either.
    pub addresses: Vec<IpNet>,
    /// Routes of the main table that do not follow from the addresses. Those
    /// on the link come first: the gateways of the others may need them.
    pub routes: Vec<RouteConfig>,
    /// Permanent neighbours, as plugins add for gateways that answer no ARP.
    pub neighbors: Vec<Neighbor>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteConfig {
    pub destination: IpNet,
    /// None: on the link. May be of the other family (RFC 5549).
    pub gateway: Option<IpAddr>,
    /// The gateway need not be inside a connected network.
    pub onlink: bool,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// `rtm_scope`: 0 is universe, 253 link.
    pub scope: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbor {
    pub address: IpAddr,
    pub mac: [u8; 6],
}

/// Reads `interface` in `netns`.
pub async fn read_interface(netns: &Netns, interface: &str) -> Result<InterfaceConfig, NetnsError> {
    check_interface_name(interface)?;
    let path = netns.path().to_owned();
    let interface = interface.to_owned();
    netns
        .run(move || async move {
            let links = Links::connect(&path)?;
            let link = links.find(&interface).await?;
            read(&links, &interface, &link).await
        })
        .await
}

/// Reads `interface`, which is `link`, in the namespace of `links`.
pub(crate) async fn read(
    links: &Links,
    interface: &str,
    link: &LinkMessage,
) -> Result<InterfaceConfig, NetnsError> {
    let index = link.header.index;
    let mac = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            _ => None,
        })
        .ok_or_else(|| links.incomplete(interface, "Ethernet address"))?;
    let mtu = mtu_of(link).ok_or_else(|| links.incomplete(interface, "MTU"))?;

    let addresses: Vec<AddressMessage> = links
        .handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute()
        .try_collect()
        .await
        .map_err(links.failed("list the addresses of", interface))?;
    let routes: Vec<RouteMessage> = links
        .handle
        .route()
        .get(RouteMessage::default())
        .execute()
        .try_collect()
        .await
        .map_err(links.failed("list the routes of", interface))?;
    let neighbours: Vec<NeighbourMessage> = links
        .handle
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(links.failed("list the neighbours of", interface))?;

    let routes: Vec<Route> = routes
        .iter()
        .filter_map(|message| Route::parse(message, index))
        .collect();
    Ok(InterfaceConfig {
        mac,
        mtu,
        addresses: choose_addresses(addresses.iter().filter_map(global_address), &routes),
        routes: choose_routes(routes),
        neighbors: neighbours
            .iter()
            .filter(|message| message.header.ifindex == index)
            .filter_map(permanent_neighbor)
            .collect(),
    })
}

/// A unicast route of the main table through the interface.
#[derive(Clone, Debug)]
struct Route {
    config: RouteConfig,
    /// Of equal destinations the lowest counts.
    metric: u32,
    /// Made by the kernel itself, for an address.
    connected: bool,
}

impl Route {
    fn parse(message: &RouteMessage, index: u32) -> Option<Self> {
        let header = &message.header;
        let learned = matches!(
            header.protocol,
            // The guest hears router advertisements itself.
            RouteProtocol::Ra | RouteProtocol::IcmpRedirect
        );
        if header.kind != RouteType::Unicast || learned {
            return None;
        }
        let mut table = u32::from(header.table);
        let mut through = None;
        let mut gateway = None;
        let mut onlink = header.flags.contains(RouteFlags::Onlink);
        let mut destination = None;
        let mut source = None;
        let mut metric = 0;
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Oif(number) => through = Some(*number),
                RouteAttribute::Destination(address) => destination = ip(address),
                RouteAttribute::PrefSource(address) => source = ip(address),
                RouteAttribute::Priority(number) => metric = *number,
                RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => {
                    gateway = gateway.or(gateway_of(attribute));
                }
                // The guest has one NIC: the first hop that uses it stands for
                // all of them.
                RouteAttribute::MultiPath(hops) => {
                    let hop = hops.iter().find(|hop| hop.interface_index == index)?;
                    through = Some(index);
                    gateway = hop.attributes.iter().find_map(gateway_of);
                    onlink = hop.flags.contains(RouteNextHopFlags::Onlink);
                }
                _ => {}
            }
        }
        if table != u32::from(RouteHeader::RT_TABLE_MAIN) || through != Some(index) {
            return None;
        }
        let unspecified = match header.address_family {
            rtnetlink::packet_route::AddressFamily::Inet => {
                IpAddr::from(std::net::Ipv4Addr::UNSPECIFIED)
            }
            _ => IpAddr::from(std::net::Ipv6Addr::UNSPECIFIED),
        };
        let destination = IpNet::new(
            destination.unwrap_or(unspecified),
            header.destination_prefix_length,
        )
        .ok()?;
        Some(Self {
            config: RouteConfig {
                destination,
                gateway,
                onlink,
                source,
                scope: header.scope.into(),
            },
            metric,
            connected: header.protocol == RouteProtocol::Kernel,
        })
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn gateway_of(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some((*address).into()),
        _ => None,
    }
}

fn global_address(message: &AddressMessage) -> Option<IpNet> {
    let header = &message.header;
    if header.scope != AddressScope::Universe {
        return None;
    }
    let mut local = None;
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    // On a point-to-point link IFA_ADDRESS is the peer.
    let ip = local.or(address)?;
    // From a router advertisement: the guest makes its own of the same.
    if ip.is_ipv6() && !header.flags.contains(AddressHeaderFlags::Permanent) {
        return None;
    }
    IpNet::new(ip, header.prefix_len).ok()
}

fn permanent_neighbor(message: &NeighbourMessage) -> Option<Neighbor> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                address = Some(IpAddr::from(*ip));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                address = Some(IpAddr::from(*ip));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
            }
            _ => {}
        }
    }
    Some(Neighbor {
        address: address?,
        mac: mac?,
    })
}

/// Narrows an address to its full length where the namespace has no connected
/// route for it: a plugin (ptp does) has taken that away on purpose.
fn choose_addresses(addresses: impl Iterator<Item = IpNet>, routes: &[Route]) -> Vec<IpNet> {
    addresses
        .map(|address| {
            let connected = routes
                .iter()
                .any(|route| route.connected && route.config.destination == address.trunc());
            if connected {
                address
            } else {
                IpNet::from(address.addr())
            }
        })
        .collect()
}

fn choose_routes(mut routes: Vec<Route>) -> Vec<RouteConfig> {
    routes.retain(|route| !route.connected);
    routes.sort_by_key(|route| (route.config.gateway.is_some(), route.metric));
    let mut chosen: Vec<RouteConfig> = Vec::new();
    let mut best: std::collections::HashMap<IpNet, u32> = std::collections::HashMap::new();
    for route in &routes {
        let metric = best.entry(route.config.destination).or_insert(route.metric);
        *metric = route.metric.min(*metric);
    }
    for route in routes {
        let seen = chosen
            .iter()
            .any(|other| other.destination == route.config.destination);
        if !seen && best.get(&route.config.destination) == Some(&route.metric) {
            chosen.push(route.config);
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing;

    fn route(destination: &str, gateway: Option<&str>, metric: u32, connected: bool) -> Route {
        Route {
            config: RouteConfig {
                destination: destination.parse().unwrap(),
                gateway: gateway.map(|ip| ip.parse().unwrap()),
                onlink: false,
                source: None,
                scope: 0,
            },
            metric,
            connected,
        }
    }

    #[test]
    fn an_address_without_its_connected_route_stands_alone() {
        let routes = [
            route("10.1.0.0/16", None, 0, true),
            route("10.2.0.0/16", Some("10.2.0.1"), 0, false),
        ];
        let addresses = ["10.1.0.5/16", "10.2.0.5/16", "fd00::5/64"].map(|a| a.parse().unwrap());
        assert_eq!(
            choose_addresses(addresses.into_iter(), &routes),
            ["10.1.0.5/16", "10.2.0.5/32", "fd00::5/128"].map(|a| a.parse::<IpNet>().unwrap())
        );
    }

    #[test]
    fn the_route_with_the_lowest_metric_wins_and_link_routes_come_first() {
        let chosen = choose_routes(vec![
            route("0.0.0.0/0", Some("169.254.1.1"), 0, false),
            route("0.0.0.0/0", Some("10.0.0.1"), 100, false),
            route("169.254.1.1/32", None, 0, false),
            route("10.0.0.0/24", None, 0, true),
        ]);
        let names: Vec<String> = chosen
            .iter()
            .map(|route| format!("{} {:?}", route.destination, route.gateway))
            .collect();
        assert_eq!(
            names,
            ["169.254.1.1/32 None", "0.0.0.0/0 Some(169.254.1.1)"]
        );
    }

    proptest! {
        #[test]
        fn each_destination_keeps_one_route_of_its_lowest_metric(
            input in proptest::collection::vec((0u8..4, 0u32..4, any::<bool>(), any::<bool>()), 0..20)
        ) {
            let routes: Vec<Route> = input
                .iter()
                .map(|(net, metric, gateway, connected)| {
                    let gateway = gateway.then(|| format!("192.0.2.{metric}"));
                    route(&format!("10.{net}.0.0/16"), gateway.as_deref(), *metric, *connected)
                })
                .collect();
            let chosen = choose_routes(routes.clone());
            let plugins: Vec<&Route> = routes.iter().filter(|route| !route.connected).collect();
            for route in &plugins {
                let same: Vec<&RouteConfig> = chosen
                    .iter()
                    .filter(|c| c.destination == route.config.destination)
                    .collect();
                prop_assert_eq!(same.len(), 1);
                let lowest = plugins
                    .iter()
                    .filter(|r| r.config.destination == route.config.destination)
                    .map(|r| r.metric)
                    .min();
                prop_assert!(plugins.iter().any(|r| &r.config == same[0] && Some(r.metric) == lowest));
            }
            let first_gateway = chosen.iter().position(|r| r.gateway.is_some());
            let last_link = chosen.iter().rposition(|r| r.gateway.is_none());
            if let (Some(gateway), Some(link)) = (first_gateway, last_link) {
                prop_assert!(link < gateway);
            }
        }
    }

    #[tokio::test]
    async fn an_interface_is_read_with_addresses_routes_and_neighbors() {
        let host = testing::Host::enter();
        let netns = Netns::create(host.dir(), "pod").await.unwrap();
        for command in [
            "link add eth0 address 02:00:00:00:00:05 mtu 1450 type veth peer name eth1",
            "address add 10.9.0.5/24 dev eth0",
            "address add 10.8.0.5/32 dev eth0",
            "address add fd00:9::5/64 dev eth0 nodad",
            "link set eth0 up",
            "link set eth1 up",
            "route add 169.254.1.1 dev eth0 scope link",
            "route add default via 169.254.1.1 dev eth0",
            "route add 10.7.0.0/16 via 10.9.0.1 src 10.8.0.5",
            "route add 10.6.0.0/16 via 192.0.2.1 dev eth0 onlink",
            "route add 10.5.0.0/16 dev eth1",
            "route add 10.4.0.0/16 dev eth0 table 7",
            "-6 route add default via fd00:9::1 dev eth0",
            "neigh add 169.254.1.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
        ] {
            testing::ip(netns.path(), command);
        }
        let config = read_interface(&netns, "eth0").await.unwrap();
        assert_eq!(config.mac, [2, 0, 0, 0, 0, 5]);
        assert_eq!(config.mtu, 1450);
        assert_eq!(
            config.addresses,
            ["10.9.0.5/24", "10.8.0.5/32", "fd00:9::5/64"].map(|a| a.parse::<IpNet>().unwrap())
        );
        let describe = |route: &RouteConfig| {
            format!(
                "{} {} {} {} {}",
                route.destination,
                route.gateway.map_or("-".to_owned(), |ip| ip.to_string()),
                route.source.map_or("-".to_owned(), |ip| ip.to_string()),
                route.onlink,
                route.scope,
            )
        };
        let mut routes: Vec<String> = config.routes.iter().map(describe).collect();
        assert_eq!(routes.remove(0), "169.254.1.1/32 - - false 253");
        routes.sort();
        assert_eq!(
            routes,
            [
                "0.0.0.0/0 169.254.1.1 - false 0",
                "10.6.0.0/16 192.0.2.1 - true 0",
                "10.7.0.0/16 10.9.0.1 10.8.0.5 false 0",
                "::/0 fd00:9::1 - false 0",
            ]
        );
        assert_eq!(
            config.neighbors,
            [Neighbor {
                address: "169.254.1.1".parse().unwrap(),
                mac: [2, 0, 0, 0, 0, 1],
            }]
        );
        assert!(matches!(
            read_interface(&netns, "eth9").await,
            Err(NetnsError::NoInterface { .. })
        ));
    }
}
