//! What the runtime knows of a pod, in the forms that plugins take it:
//! identity in `CNI_ARGS`, the rest as capabilities
//! (CNI conventions, "Dynamic Plugin specific fields").

use std::{net::IpAddr, num::NonZeroU16, path::PathBuf};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{config::is_identifier, error::CniError};

/// A pod to attach to a network.
#[derive(Clone, Debug)]
pub struct PodNetwork {
    pub sandbox_id: String,
    pub netns: PathBuf,
    /// The interface that the plugins make in the namespace, usually eth0.
    pub interface: String,
    pub pod_namespace: String,
    pub pod_name: String,
    pub pod_uid: String,
    pub port_mappings: Vec<PortMapping>,
    pub bandwidth: Option<Bandwidth>,
    pub dns: Option<PodDns>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    pub host_port: NonZeroU16,
    pub container_port: NonZeroU16,
    pub protocol: Protocol,
    /// None: all of the host's addresses.
    #[serde(rename = "hostIP", skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// Rates in bits a second, bursts in bits; None is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress_rate: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress_burst: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_rate: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_burst: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PodDns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// Leaves room for the network's name and the interface in a record's file name.
const MAX_SANDBOX_ID: usize = 128;

impl PodNetwork {
    pub(crate) fn check(&self) -> Result<(), CniError> {
        let invalid = |field, value: &str| CniError::Invalid {
            field,
            value: value.to_owned(),
        };
        check_ids(&self.sandbox_id, &self.interface)?;
        let netns = self.netns.to_string_lossy();
        if !self.netns.is_absolute() || netns.contains(['\0', char::REPLACEMENT_CHARACTER]) {
            return Err(invalid("network namespace", &netns));
        }
        for (field, value) in [
            ("pod namespace", &self.pod_namespace),
            ("pod name", &self.pod_name),
            ("pod uid", &self.pod_uid),
        ] {
            // Both split CNI_ARGS; neither is in a Kubernetes name.
            if value.len() > 253 || value.contains([';', '=', '\0']) {
                return Err(invalid(field, value));
            }
        }
        Ok(())
    }

    /// `CNI_ARGS`, as the kubelet's runtimes have always written it.
    pub(crate) fn args(&self) -> String {
        format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};\
             K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.pod_namespace, self.pod_name, self.sandbox_id, self.pod_uid
        )
    }

    /// Values by capability; a plugin gets those that it declares.
    pub(crate) fn capabilities(&self) -> Map<String, Value> {
        let mut all = Map::new();
        if !self.port_mappings.is_empty() {
            all.insert("portMappings".to_owned(), json!(self.port_mappings));
        }
        if let Some(bandwidth) = self.bandwidth
            && bandwidth != Bandwidth::default()
        {
            all.insert("bandwidth".to_owned(), json!(bandwidth.with_bursts()));
        }
        if let Some(dns) = &self.dns {
            all.insert("dns".to_owned(), json!(dns));
        }
        all
    }
}

impl Bandwidth {
    /// The bandwidth plugin refuses a rate without a burst. Other runtimes
    /// fill in the largest one it takes, which leaves the rate alone to count.
    fn with_bursts(mut self) -> Self {
        const MAX_BURST_BITS: u64 = u32::MAX as u64;
        if self.ingress_rate.is_some() {
            self.ingress_burst.get_or_insert(MAX_BURST_BITS);
        }
        if self.egress_rate.is_some() {
            self.egress_burst.get_or_insert(MAX_BURST_BITS);
        }
        self
    }
}

pub(crate) fn check_ids(sandbox_id: &str, interface: &str) -> Result<(), CniError> {
    if !is_identifier(sandbox_id, MAX_SANDBOX_ID) {
        return Err(CniError::Invalid {
            field: "pod sandbox id",
            value: sandbox_id.to_owned(),
        });
    }
    crate::netlink::check_interface_name(interface).map_err(|_| CniError::Invalid {
        field: "interface name",
        value: interface.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodNetwork {
        PodNetwork {
            sandbox_id: "abc".to_owned(),
            netns: "/run/netns/x".into(),
            interface: "eth0".to_owned(),
            pod_namespace: "default".to_owned(),
            pod_name: "web-0".to_owned(),
            pod_uid: "u-1".to_owned(),
            port_mappings: Vec::new(),
            bandwidth: None,
            dns: None,
        }
    }

    #[test]
    fn capabilities_have_the_plugins_own_forms() {
        let mut pod = pod();
        assert!(pod.capabilities().is_empty());
        let port = |port| NonZeroU16::new(port).unwrap();
        pod.port_mappings = vec![PortMapping {
            host_port: port(8080),
            container_port: port(80),
            protocol: Protocol::Tcp,
            host_ip: Some("127.0.0.1".parse().unwrap()),
        }];
        pod.bandwidth = Some(Bandwidth {
            ingress_rate: Some(1_000_000),
            ..Bandwidth::default()
        });
        pod.dns = Some(PodDns {
            servers: vec!["10.0.0.10".to_owned()],
            ..PodDns::default()
        });
        assert_eq!(
            Value::Object(pod.capabilities()),
            json!({
                "portMappings": [{
                    "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1",
                }],
                "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": 4_294_967_295_u64},
                "dns": {"servers": ["10.0.0.10"], "searches": [], "options": []},
            })
        );
    }

    #[test]
    fn nothing_can_slip_an_argument_in() {
        assert!(pod().check().is_ok());
        assert_eq!(
            pod().args(),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;\
             K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u-1"
        );
        let spoil: [fn(&mut PodNetwork); 5] = [
            |pod| pod.pod_name = "a;IP=10.0.0.1".to_owned(),
            |pod| pod.pod_uid = "a=b".to_owned(),
            |pod| pod.sandbox_id = "../x".to_owned(),
            |pod| pod.interface = "eth/0".to_owned(),
            |pod| pod.netns = "relative".into(),
        ];
        for spoil in spoil {
            let mut pod = pod();
            spoil(&mut pod);
            assert!(matches!(pod.check(), Err(CniError::Invalid { .. })));
        }
    }
}
