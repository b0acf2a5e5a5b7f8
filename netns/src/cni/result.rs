//! What an ADD yields (CNI 1.1, "Success"), in the forms since 0.3.0.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

/// The result of an ADD, of the last plugin of the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddResult {
    pub ips: Vec<ResultIp>,
    pub interfaces: Vec<ResultInterface>,
    pub routes: Vec<ResultRoute>,
    pub dns: ResultDns,
    /// As the plugin wrote it.
    pub json: Value,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ResultIp {
    pub address: IpNet,
    #[serde(default)]
    pub gateway: Option<IpAddr>,
    /// Index into the interfaces.
    #[serde(default)]
    pub interface: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ResultInterface {
    pub name: String,
    #[serde(default)]
    pub mac: String,
    /// The namespace's path; empty for an interface of the host.
    #[serde(default)]
    pub sandbox: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ResultRoute {
    pub dst: IpNet,
    #[serde(default)]
    pub gw: Option<IpAddr>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ResultDns {
    pub nameservers: Vec<String>,
    pub domain: String,
    pub search: Vec<String>,
    pub options: Vec<String>,
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    ips: Option<Vec<ResultIp>>,
    #[serde(default)]
    interfaces: Option<Vec<ResultInterface>>,
    #[serde(default)]
    routes: Option<Vec<ResultRoute>>,
    #[serde(default)]
    dns: Option<ResultDns>,
}

impl AddResult {
    pub(crate) fn parse(json: Value) -> Result<Self, serde_json::Error> {
        let wire = Wire::deserialize(&json)?;
        Ok(Self {
            ips: wire.ips.unwrap_or_default(),
            interfaces: wire.interfaces.unwrap_or_default(),
            routes: wire.routes.unwrap_or_default(),
            dns: wire.dns.unwrap_or_default(),
            json,
        })
    }

    /// The pod's addresses: those of interfaces inside a sandbox, and those
    /// that name no interface.
    pub fn pod_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.ips.iter().filter_map(|ip| {
            let on_host = ip
                .interface
                .and_then(|index| self.interfaces.get(index))
                .is_some_and(|interface| interface.sandbox.is_empty());
            (!on_host).then(|| ip.address.addr())
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn results_of_all_versions_are_read() {
        let old = AddResult::parse(json!({
            "cniVersion": "0.4.0",
            "interfaces": [{"name": "veth1"}, {"name": "eth0", "mac": "x", "sandbox": "/n"}],
            "ips": [
                {"version": "4", "interface": 1, "address": "10.1.2.3/24", "gateway": "10.1.2.1"},
                {"version": "4", "interface": 0, "address": "10.9.9.9/24"},
            ],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dns": {"nameservers": ["10.1.2.1"]},
        }))
        .unwrap();
        assert_eq!(
            old.pod_ips().collect::<Vec<_>>(),
            ["10.1.2.3".parse::<IpAddr>().unwrap()]
        );
        assert_eq!(old.dns.nameservers, ["10.1.2.1"]);

        let new = AddResult::parse(json!({
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "eth0", "mtu": 1400, "socketPath": "", "sandbox": "/n"}],
            "ips": [{"address": "fd00::2/64"}],
            "routes": [{"dst": "::/0", "gw": "fd00::1", "mtu": 9, "table": 1}],
        }))
        .unwrap();
        assert_eq!(new.ips[0].address, "fd00::2/64".parse().unwrap());
        assert_eq!(new.routes[0].gw, Some("fd00::1".parse().unwrap()));

        let empty = AddResult::parse(json!({"ips": null})).unwrap();
        assert!(empty.ips.is_empty());
        assert!(AddResult::parse(json!({"ips": [{"address": "10.0.0.1"}]})).is_err());
        assert!(AddResult::parse(json!("no")).is_err());
    }
}
