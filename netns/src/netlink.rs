//! A route-netlink connection of the thread's namespace, with errors that name
//! the interface and the namespace.

use std::{
    io,
    path::{Path, PathBuf},
};

use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, LinkUnspec,
    packet_route::link::{LinkAttribute, LinkMessage},
};

use crate::error::NetnsError;

pub(crate) struct Links {
    pub(crate) handle: Handle,
    netns: PathBuf,
}

impl Links {
    /// Connects to the namespace that this thread is in; `netns` is what
    /// errors call it. The connection is driven by the current runtime.
    pub(crate) fn connect(netns: &Path) -> Result<Self, NetnsError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|source| NetnsError::System {
                action: "open a netlink socket",
                netns: netns.to_owned(),
                source,
            })?;
        tokio::spawn(connection);
        Ok(Self {
            handle,
            netns: netns.to_owned(),
        })
    }

    pub(crate) async fn find(&self, interface: &str) -> Result<LinkMessage, NetnsError> {
        let found = self
            .handle
            .link()
            .get()
            .match_name(interface.to_owned())
            .execute()
            .try_next()
            .await;
        match found {
            Ok(Some(link)) => Ok(link),
            Ok(None) => Err(self.no_interface(interface)),
            Err(rtnetlink::Error::NetlinkError(error)) if is(&error, libc::ENODEV) => {
                Err(self.no_interface(interface))
            }
            Err(source) => Err(self.failed("look up", interface)(source)),
        }
    }

    pub(crate) async fn set_up(&self, interface: &str) -> Result<(), NetnsError> {
        let index = self.find(interface).await?.header.index;
        self.set(interface, LinkUnspec::new_with_index(index).up().build())
            .await
    }

    pub(crate) async fn set(&self, interface: &str, link: LinkMessage) -> Result<(), NetnsError> {
        self.handle
            .link()
            .set(link)
            .execute()
            .await
            .map_err(self.failed("set up", interface))
    }

    /// Wraps a netlink error of `action` on `interface`.
    pub(crate) fn failed(
        &self,
        action: &'static str,
        interface: &str,
    ) -> impl FnOnce(rtnetlink::Error) -> NetnsError {
        let interface = interface.to_owned();
        let netns = self.netns.clone();
        move |error| NetnsError::Netlink {
            action,
            interface,
            netns,
            source: match error {
                rtnetlink::Error::NetlinkError(error) => error.to_io(),
                error => io::Error::other(error),
            },
        }
    }

    pub(crate) fn incomplete(&self, interface: &str, what: &'static str) -> NetnsError {
        NetnsError::Incomplete {
            interface: interface.to_owned(),
            netns: self.netns.clone(),
            what,
        }
    }

    fn no_interface(&self, interface: &str) -> NetnsError {
        NetnsError::NoInterface {
            interface: interface.to_owned(),
            netns: self.netns.clone(),
        }
    }
}

/// Whether the kernel answered with `errno` (netlink carries it negated).
pub(crate) fn is(error: &rtnetlink::packet_core::ErrorMessage, errno: i32) -> bool {
    error.raw_code() == -errno
}

pub(crate) fn mtu_of(link: &LinkMessage) -> Option<u32> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        })
}

/// An interface name as the kernel takes it (`dev_valid_name`).
pub(crate) fn check_interface_name(name: &str) -> Result<(), NetnsError> {
    let valid = (1..libc::IFNAMSIZ).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace());
    if valid {
        Ok(())
    } else {
        Err(NetnsError::InterfaceName {
            name: name.to_owned(),
        })
    }
}
