//! A pod's network in the terms of CNI on one side and of the agent on the
//! other.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::Duration;

use netns::cni::{
    AddResult, Attachment, Bandwidth, Cni, CniOptions, CniWatcher, Collection, NetworkState,
    PodDns, PodNetwork, PortMapping, ResultDns, load_network,
};
use netns::{InterfaceConfig, NetnsError, SourceCheck};
use tokio::sync::Semaphore;

use crate::paths::PodPaths;
use crate::record::PodRecord;
use crate::spec::{Dns, Protocol};
use crate::{Error, Result};

/// The interface CNI makes in the pod's namespace and its name in the guest.
pub const INTERFACE: &str = "eth0";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The largest resolv.conf that is read.
const MAX_RESOLV_CONF: usize = 64 * 1024;

const CHECKS_AT_ONCE: usize = 2;

/// Where the node's network comes from.
#[derive(Clone, Debug)]
pub struct NetworkOptions {
    pub conf_dir: PathBuf,
    pub bin_dirs: Vec<PathBuf>,
    /// Persistent: what was attached to what.
    pub record_dir: PathBuf,
    pub plugin_timeout: Duration,
    pub source_check_exempt: Exempt,
}

/// The Kubernetes namespaces whose pods are not held to their addresses.
#[derive(Clone, Debug, Default)]
pub struct Exempt(BTreeSet<String>);

impl Exempt {
    /// Stands for every namespace.
    pub const ALL: &str = "*";

    #[must_use]
    pub fn new(names: &[String]) -> Self {
        Self(names.iter().cloned().collect())
    }

    #[must_use]
    pub fn all(&self) -> bool {
        self.0.contains(Self::ALL)
    }

    fn check(&self, namespace: &str) -> SourceCheck {
        if self.all() || self.0.contains(namespace) {
            SourceCheck::Off
        } else {
            SourceCheck::On
        }
    }
}

/// The node's pod network: CNI plugins and the watched configuration.
pub struct Network {
    cni: Cni,
    watcher: CniWatcher,
    /// Nobody waits for a CHECK, but pods that start wait for CPU time.
    checks: Semaphore,
    check_timeout: Duration,
    source_check_exempt: Exempt,
}

impl Network {
    pub async fn open(options: NetworkOptions) -> io::Result<Self> {
        if !options.source_check_exempt.all()
            && let Err(why) = Self::try_source_check().await
        {
            tracing::error!(
                why,
                "pods with a kernel of their own cannot start, but those of namespaces in \
                 network.source_check_exempt"
            );
        }
        let watcher = CniWatcher::start(options.conf_dir, options.bin_dirs.clone()).await?;
        let cni = Cni::new(CniOptions {
            bin_dirs: options.bin_dirs,
            record_dir: options.record_dir,
            timeout: options.plugin_timeout,
        });
        Ok(Self {
            cni,
            watcher,
            checks: Semaphore::new(CHECKS_AT_ONCE),
            check_timeout: options.plugin_timeout,
            source_check_exempt: options.source_check_exempt,
        })
    }

    /// Whether the node's kernel can hold pods to their addresses, or why not.
    pub async fn try_source_check() -> std::result::Result<(), String> {
        let tried = netns::try_source_check().await;
        tried.map_err(|error| crate::error::sentence(&error))
    }

    /// Joins a pod's interface and its tap; returns how its guest's NIC is to
    /// be set up.
    pub(crate) async fn redirect(
        &self,
        pod: &PodRecord,
        netns: &netns::Netns,
        tap: &str,
    ) -> Result<InterfaceConfig> {
        let namespace = &pod.spec.name.namespace;
        let check = self.source_check_exempt.check(namespace);
        match netns::redirect(netns, INTERFACE, tap, check).await {
            Err(
                source @ (NetnsError::NoClassifier { .. } | NetnsError::TooManyAddresses { .. }),
            ) => Err(Error::NoSourceCheck {
                namespace: namespace.clone(),
                source,
            }),
            other => Ok(other?),
        }
    }

    /// One look, without watching: the network's name, or why there is none.
    pub fn probe(conf_dir: &Path, bin_dirs: &[PathBuf]) -> std::result::Result<String, String> {
        load_network(conf_dir, bin_dirs)
            .map(|network| network.name)
            .map_err(|why| why.to_string())
    }

    pub(crate) fn state(&self) -> std::result::Result<(), String> {
        match self.watcher.current() {
            NetworkState::Ready(_) => Ok(()),
            NetworkState::NotReady(reason) => Err(reason),
        }
    }

    pub(crate) fn ready(&self) -> Result<()> {
        self.state().map_err(Error::NoNetwork)
    }

    pub(crate) async fn add(&self, pod: &PodNetwork) -> Result<AddResult> {
        match self.watcher.current() {
            NetworkState::Ready(network) => Ok(self.cni.add(&network, pod).await?),
            NetworkState::NotReady(reason) => Err(Error::NoNetwork(reason)),
        }
    }

    pub(crate) async fn del(&self, pod: &str) -> Result<()> {
        Ok(self.cni.del(pod, INTERFACE).await?)
    }

    /// What the plugins find changed of a pod's attachment, in one sentence. All
    /// of them together have the time of one.
    pub(crate) async fn check(&self, pod: &str) -> Option<String> {
        let _place = self.checks.acquire().await;
        let checked = self.cni.check(pod, INTERFACE);
        let text = |error: &dyn std::error::Error| crate::error::sentence(error);
        match tokio::time::timeout(self.check_timeout, checked).await {
            Ok(Ok(complaints)) => {
                let texts: Vec<String> = complaints.iter().map(|error| text(error)).collect();
                (!texts.is_empty()).then(|| texts.join("; "))
            }
            Ok(Err(error)) => Some(text(&error)),
            // A complaint would have had to be made by now.
            Err(_) => {
                tracing::debug!(pod, "CNI CHECK did not end in time");
                None
            }
        }
    }

    /// Begins to detach what belongs to none of `pods`. Nothing is attached or
    /// detached until [`Network::finish_gc`] has asked the plugins.
    pub(crate) async fn begin_gc(&self, pods: impl Iterator<Item = String>) -> Result<Collection> {
        let valid: BTreeSet<Attachment> = pods
            .map(|sandbox_id| Attachment {
                sandbox_id,
                interface: INTERFACE.to_owned(),
            })
            .collect();
        Ok(self.cni.begin_gc(valid).await?)
    }

    pub(crate) async fn finish_gc(&self, collection: Collection) -> Result<()> {
        let network = match self.watcher.current() {
            NetworkState::Ready(network) => Some(network),
            NetworkState::NotReady(_) => None,
        };
        Ok(collection.finish(network.as_deref()).await?)
    }
}

/// What ADD of a pod is asked with; follows from its record.
#[must_use]
pub fn request(record: &PodRecord, paths: &PodPaths) -> PodNetwork {
    let spec = &record.spec;
    let mapping = |mapping: &crate::spec::PortMapping| {
        // Without a host port there is nothing to map.
        Some(PortMapping {
            host_port: NonZeroU16::new(mapping.host_port)?,
            container_port: NonZeroU16::new(mapping.container_port)?,
            protocol: match mapping.protocol {
                Protocol::Tcp => netns::cni::Protocol::Tcp,
                Protocol::Udp => netns::cni::Protocol::Udp,
                Protocol::Sctp => netns::cni::Protocol::Sctp,
            },
            host_ip: mapping.host_ip.parse().ok(),
        })
    };
    let bandwidth = Bandwidth {
        ingress_rate: spec.bandwidth.ingress_bits,
        egress_rate: spec.bandwidth.egress_bits,
        ..Bandwidth::default()
    };
    PodNetwork {
        sandbox_id: record.id.clone(),
        netns: paths.netns.clone(),
        interface: INTERFACE.to_owned(),
        pod_namespace: spec.name.namespace.clone(),
        pod_name: spec.name.name.clone(),
        pod_uid: spec.name.uid.clone(),
        port_mappings: spec.port_mappings.iter().filter_map(mapping).collect(),
        bandwidth: (bandwidth != Bandwidth::default()).then_some(bandwidth),
        dns: spec.dns.as_ref().map(|dns| PodDns {
            servers: dns.servers.clone(),
            searches: dns.searches.clone(),
            options: dns.options.clone(),
        }),
    }
}

/// What the pod resolves names with: as asked, else as CNI says, else as the
/// node does.
pub fn guest_dns(asked: Option<&Dns>, cni: &ResultDns) -> Result<agent_api::Dns> {
    if let Some(dns) = asked {
        return Ok(agent_api::Dns {
            servers: dns.servers.clone(),
            searches: dns.searches.clone(),
            options: dns.options.clone(),
        });
    }
    if !cni.nameservers.is_empty() {
        return Ok(agent_api::Dns {
            servers: cni.nameservers.clone(),
            searches: cni.search.clone(),
            options: cni.options.clone(),
        });
    }
    let path = Path::new(RESOLV_CONF);
    match fs::read_to_string(path) {
        Ok(text) => Ok(parse_resolv_conf(
            &text[..text.floor_char_boundary(MAX_RESOLV_CONF)],
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(agent_api::Dns::default()),
        Err(source) => Err(Error::File {
            what: "resolver configuration",
            path: path.to_owned(),
            source,
        }),
    }
}

fn parse_resolv_conf(text: &str) -> agent_api::Dns {
    let mut dns = agent_api::Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
            // The last of these lines wins (resolv.conf(5)).
            Some("search" | "domain") => dns.searches = words.map(str::to_owned).collect(),
            Some("options") => dns.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    dns
}

/// The guest's NIC takes over what CNI gave to the interface beside the tap.
#[must_use]
pub fn guest_interface(interface: &InterfaceConfig) -> agent_api::Interface {
    agent_api::Interface {
        name: INTERFACE.to_owned(),
        mac: interface.mac.to_vec(),
        mtu: interface.mtu,
        addresses: interface
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect(),
        routes: interface
            .routes
            .iter()
            .map(|route| agent_api::Route {
                destination: route.destination.to_string(),
                gateway: route.gateway.map(|ip| ip.to_string()).unwrap_or_default(),
                onlink: route.onlink,
                source: route.source.map(|ip| ip.to_string()).unwrap_or_default(),
                scope: route.scope.into(),
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_namespaces_that_are_named_are_exempt() {
        let checks = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            let exempt = Exempt::new(&names);
            ["default", "routers", ""].map(|name| exempt.check(name) == SourceCheck::On)
        };
        assert_eq!(checks(&[]), [true, true, true]);
        assert_eq!(checks(&["routers"]), [true, false, true]);
        assert_eq!(checks(&["routers", "*"]), [false, false, false]);
    }

    #[test]
    fn the_nodes_resolver_is_read_as_resolv_conf_5_says() {
        let dns = parse_resolv_conf(
            "# a\nnameserver 10.0.0.1\nnameserver fd00::1\nsearch a b\nsearch c d\noptions ndots:2 edns0\n",
        );
        assert_eq!(dns.servers, ["10.0.0.1", "fd00::1"]);
        assert_eq!(dns.searches, ["c", "d"]);
        assert_eq!(dns.options, ["ndots:2", "edns0"]);
    }
}
