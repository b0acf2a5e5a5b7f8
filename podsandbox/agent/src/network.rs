//! The guest's loopback and its one NIC, by rtnetlink(7).

use std::net::IpAddr;
use std::path::Path;

use agent_api::Interface as Request;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder, new_connection};

/// Addresses and routes of one NIC; CNI gives a pod a handful.
const MAX_ITEMS: usize = 256;

/// `IFNAMSIZ`, less the null byte.
const MAX_NAME: usize = 15;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("cannot open a netlink socket")]
    Connect(#[source] std::io::Error),
    #[error("cannot list the network interfaces")]
    List(#[source] rtnetlink::Error),
    #[error("{value:?} is no {field} of an interface")]
    Invalid { field: &'static str, value: String },
    #[error("the interface has {count} {field}, more than {MAX_ITEMS}")]
    TooMany { field: &'static str, count: usize },
    #[error("the guest has no network interface with address {mac}")]
    NoInterface { mac: String },
    #[error("cannot set up interface {name}")]
    Link {
        name: String,
        source: rtnetlink::Error,
    },
    #[error("cannot add address {address}")]
    Address {
        address: String,
        source: rtnetlink::Error,
    },
    #[error("cannot add route {route}")]
    Route {
        route: String,
        source: rtnetlink::Error,
    },
}

/// A netlink socket and the task that reads it, for as long as it is used.
struct Netlink {
    handle: Handle,
    reader: tokio::task::JoinHandle<()>,
}

impl Netlink {
    fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) = new_connection().map_err(NetworkError::Connect)?;
        Ok(Self {
            handle,
            reader: tokio::spawn(connection),
        })
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// A prefix in CIDR notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix {
    address: IpAddr,
    length: u8,
}

fn prefix(field: &'static str, text: &str) -> Result<Prefix, NetworkError> {
    let parse = || {
        let (address, length) = text.split_once('/')?;
        let (address, length) = (address.parse::<IpAddr>().ok()?, length.parse::<u8>().ok()?);
        let longest = if address.is_ipv4() { 32 } else { 128 };
        (length <= longest).then_some(Prefix { address, length })
    };
    parse().ok_or_else(|| NetworkError::Invalid {
        field,
        value: text.to_owned(),
    })
}

fn address(field: &'static str, text: &str) -> Result<Option<IpAddr>, NetworkError> {
    if text.is_empty() {
        return Ok(None);
    }
    let invalid = |_| NetworkError::Invalid {
        field,
        value: text.to_owned(),
    };
    text.parse().map(Some).map_err(invalid)
}

/// A NIC's settings, all of them readable.
#[derive(Debug)]
pub struct Interface {
    name: String,
    mac: Vec<u8>,
    mtu: u32,
    addresses: Vec<Prefix>,
    /// With the words that name each in an error.
    routes: Vec<(RouteMessage, String)>,
}

impl Interface {
    pub fn parse(request: &Request) -> Result<Self, NetworkError> {
        let invalid = |field, value: &str| NetworkError::Invalid {
            field,
            value: value.to_owned(),
        };
        let name = request.name.clone();
        let fine = (1..=MAX_NAME).contains(&name.len())
            && name
                .bytes()
                .all(|b| b.is_ascii_graphic() && b != b'/' && b != b':')
            && name != "."
            && name != "..";
        if !fine {
            return Err(invalid("name", &name));
        }
        if request.mac.len() != 6 {
            return Err(invalid("MAC address", &mac_text(&request.mac)));
        }
        for (field, count) in [
            ("addresses", request.addresses.len()),
            ("routes", request.routes.len()),
        ] {
            if count > MAX_ITEMS {
                return Err(NetworkError::TooMany { field, count });
            }
        }
        let addresses = request
            .addresses
            .iter()
            .map(|text| prefix("address", text))
            .collect::<Result<_, _>>()?;
        let mut routes = request
            .routes
            .iter()
            .map(route)
            .collect::<Result<Vec<_>, _>>()?;
        // A gateway has to be reachable when its route is added: routes on the
        // link first, then the more specific ones, the default routes last.
        routes.sort_by_key(|(route, has_gateway)| {
            (
                *has_gateway,
                std::cmp::Reverse(route.0.header.destination_prefix_length),
            )
        });
        Ok(Self {
            name,
            mac: request.mac.clone(),
            mtu: request.mtu,
            addresses,
            routes: routes.into_iter().map(|(route, _)| route).collect(),
        })
    }
}

type NamedRoute = (RouteMessage, String);

/// The route without its interface, and whether it has a gateway.
fn route(request: &agent_api::Route) -> Result<(NamedRoute, bool), NetworkError> {
    let destination = prefix("route destination", &request.destination)?;
    let gateway = address("route gateway", &request.gateway)?;
    let source = address("route source", &request.source)?;
    let scope = u8::try_from(request.scope).map_err(|_| NetworkError::Invalid {
        field: "route scope",
        value: request.scope.to_string(),
    })?;
    let text = match gateway {
        Some(gateway) => format!("{} via {gateway}", request.destination),
        None => request.destination.clone(),
    };
    let invalid = |_| NetworkError::Invalid {
        field: "route",
        value: text.clone(),
    };
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.address, destination.length)
        .map_err(invalid)?
        .scope(RouteScope::from(scope));
    if let Some(source) = source {
        builder = builder.pref_source(source).map_err(invalid)?;
    }
    if let Some(gateway) = gateway {
        builder = builder.gateway(gateway).map_err(invalid)?;
        if request.onlink {
            builder = builder.onlink();
        }
    }
    Ok(((builder.build(), text), gateway.is_some()))
}

fn mac_text(mac: &[u8]) -> String {
    mac.iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

/// Brings the loopback up: 127.0.0.1 and ::1 come with it.
pub async fn loopback_up() -> Result<(), NetworkError> {
    /// The loopback is the first interface of every network namespace.
    const LOOPBACK: u32 = 1;
    let netlink = Netlink::open()?;
    let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
    netlink
        .handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(|source| NetworkError::Link {
            name: "lo".to_owned(),
            source,
        })
}

/// Moves the NIC into the network namespace of process `pid`, with its own
/// address, by which [`configure`] finds it there: the agent's sysfs shows
/// only the devices of the guest's first namespace.
pub async fn move_to(interface: &Interface, pid: u32) -> Result<(), NetworkError> {
    let netlink = Netlink::open()?;
    let links = netlink.handle.link();
    let found: Vec<LinkMessage> = links
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(NetworkError::List)?;
    let link = pick(&found, &interface.mac).ok_or_else(|| NetworkError::NoInterface {
        mac: mac_text(&interface.mac),
    })?;
    let index = link.header.index;
    let settings = [
        LinkUnspec::new_with_index(index).address(interface.mac.clone()),
        LinkUnspec::new_with_index(index).setns_by_pid(pid),
    ];
    for settings in settings {
        links
            .set(settings.build())
            .execute()
            .await
            .map_err(|source| NetworkError::Link {
                name: interface.name.clone(),
                source,
            })?;
    }
    Ok(())
}

/// Sets up the NIC. `named` runs once it has its name, before it is up: that
/// is when its kernel parameters can be set.
pub async fn configure<E: From<NetworkError>>(
    interface: Interface,
    named: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let netlink = Netlink::open()?;
    let links = netlink.handle.link();
    let found: Vec<LinkMessage> = links
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(NetworkError::List)?;
    let link = pick(&found, &interface.mac).ok_or_else(|| NetworkError::NoInterface {
        mac: mac_text(&interface.mac),
    })?;
    let index = link.header.index;
    let failed = |source| NetworkError::Link {
        name: interface.name.clone(),
        source,
    };

    let mut settings = LinkUnspec::new_with_index(index)
        .name(interface.name.clone())
        .address(interface.mac.clone());
    if interface.mtu != 0 {
        settings = settings.mtu(interface.mtu);
    }
    links
        .set(settings.build())
        .execute()
        .await
        .map_err(failed)?;
    named()?;
    for &Prefix { address, length } in &interface.addresses {
        let mut request = netlink.handle.address().add(index, address, length);
        if address.is_ipv6() {
            // CNI has given the address to this pod alone; a second of
            // duplicate address detection would delay its first connection.
            let message = request.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request
            .replace()
            .execute()
            .await
            .map_err(|source| NetworkError::Address {
                address: format!("{address}/{length}"),
                source,
            })?;
    }
    links
        .set(LinkUnspec::new_with_index(index).up().build())
        .execute()
        .await
        .map_err(failed)?;
    for (mut route, text) in interface.routes {
        route
            .attributes
            .push(rtnetlink::packet_route::route::RouteAttribute::Oif(index));
        netlink
            .handle
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .map_err(|source| NetworkError::Route {
                route: text,
                source,
            })?;
    }
    Ok(())
}

/// The NIC with the wanted address; the only one there is when a VMM gives it
/// another.
fn pick<'a>(links: &'a [LinkMessage], mac: &[u8]) -> Option<&'a LinkMessage> {
    let address = |link: &'a LinkMessage| {
        link.attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::Address(address) => Some(address.as_slice()),
                _ => None,
            })
    };
    if let Some(link) = links.iter().find(|link| address(link) == Some(mac)) {
        return Some(link);
    }
    let mut nics = links.iter().filter(|link| {
        address(link).is_some_and(|address| address.len() == mac.len()) && is_device(link)
    });
    nics.next().filter(|_| nics.next().is_none())
}

/// Whether hardware is behind the link, unlike `lo` and what the kernel makes
/// on its own, such as `dummy0`.
fn is_device(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::IfName(name) => Path::new("/sys/class/net")
            .join(name)
            .join("device")
            .exists(),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use agent_api::Route;

    use super::*;

    fn request() -> Request {
        Request {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1400,
            addresses: vec!["10.1.0.5/24".into(), "fd00::5/64".into()],
            routes: Vec::new(),
        }
    }

    fn route_to(destination: &str, gateway: &str) -> Route {
        Route {
            destination: destination.into(),
            gateway: gateway.into(),
            ..Route::default()
        }
    }

    #[test]
    fn routes_on_the_link_come_before_those_that_need_them() {
        let routes = vec![
            route_to("0.0.0.0/0", "169.254.1.1"),
            route_to("10.0.0.0/8", "10.1.0.1"),
            route_to("169.254.1.1/32", ""),
            route_to("::/0", "fd00::1"),
        ];
        let interface = Interface::parse(&Request {
            routes,
            ..request()
        })
        .unwrap();
        let order: Vec<&str> = interface
            .routes
            .iter()
            .map(|(_, text)| text.as_str())
            .collect();
        assert_eq!(
            order,
            [
                "169.254.1.1/32",
                "10.0.0.0/8 via 10.1.0.1",
                "0.0.0.0/0 via 169.254.1.1",
                "::/0 via fd00::1"
            ]
        );
    }

    #[test]
    fn what_is_no_address_is_named() {
        for (addresses, routes) in [
            (vec!["10.1.0.5".to_owned()], vec![]),
            (vec!["10.1.0.5/33".to_owned()], vec![]),
            (vec![], vec![route_to("default", "10.1.0.1")]),
            (vec![], vec![route_to("10.0.0.0/8", "gateway")]),
            (vec![], vec![route_to("fd00::/8", "10.1.0.1")]),
        ] {
            let error = Interface::parse(&Request {
                addresses,
                routes,
                ..request()
            })
            .unwrap_err();
            assert!(matches!(error, NetworkError::Invalid { .. }), "{error}");
        }
        let error = Interface::parse(&Request {
            name: "a/b".into(),
            ..request()
        })
        .unwrap_err();
        assert_eq!(error.to_string(), "\"a/b\" is no name of an interface");
    }
}
