//! Pod sandboxes: from `PodSandboxConfig`, to `PodSandbox` and its status.

use std::net::IpAddr;
use std::path::{Component, PathBuf};

use cri_api::v1;
use podsandbox::PodSnapshot;
use podsandbox::spec::{Bandwidth, Dns, HostNamespaces, PodName, PodSpec, PortMapping, Protocol};
use tonic::Status;

use super::{invalid, required, resources, userns};

/// Linux takes no longer host name (`__NEW_UTS_LEN`).
const MAX_HOSTNAME: usize = 64;
/// What the kubelet cuts a pod's name to: the longest label of a domain name.
const MAX_DERIVED_HOSTNAME: usize = 63;
/// More than any pod declares; bounds what CNI plugins are handed.
const MAX_PORT_MAPPINGS: usize = 4096;

pub fn parse(config: v1::PodSandboxConfig, handler: String) -> Result<PodSpec, Status> {
    let metadata = required("config.metadata", config.metadata)?;
    if metadata.name.is_empty() {
        return Err(invalid("config.metadata.name", "is empty"));
    }
    if metadata.namespace.is_empty() {
        return Err(invalid("config.metadata.namespace", "is empty"));
    }
    let linux = config.linux.unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let options = security.namespace_options.unwrap_or_default();
    let user_namespace = userns::parse(
        "config.linux.security_context.namespace_options.userns_options",
        options.userns_options.as_ref(),
    )?;
    let hostname = if config.hostname.is_empty() {
        derived_hostname(&metadata.name)
    } else {
        config.hostname
    };
    if hostname.len() > MAX_HOSTNAME {
        return Err(invalid(
            "config.hostname",
            format_args!("{hostname:?} is longer than {MAX_HOSTNAME} bytes"),
        ));
    }
    if !hostname.bytes().all(is_of_hostname) {
        return Err(invalid(
            "config.hostname",
            format_args!("{hostname:?} has other than letters, digits, '-', '.' and '_'"),
        ));
    }
    if config.port_mappings.len() > MAX_PORT_MAPPINGS {
        return Err(invalid(
            "config.port_mappings",
            format_args!("more than {MAX_PORT_MAPPINGS}"),
        ));
    }
    let cgroup_parent = absolute("config.linux.cgroup_parent", &linux.cgroup_parent)?;
    if cgroup_parent
        .iter()
        .flat_map(|path| path.components())
        .any(|part| part == Component::ParentDir)
    {
        return Err(invalid("config.linux.cgroup_parent", "has a '..' in it"));
    }
    Ok(PodSpec {
        name: PodName {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            attempt: metadata.attempt,
        },
        handler,
        hostname,
        log_directory: absolute("config.log_directory", &config.log_directory)?,
        // Empty as a whole means the node's own, as for the field's runtimes.
        dns: config
            .dns_config
            .filter(|dns| *dns != v1::DnsConfig::default())
            .map(|dns| Dns {
                servers: dns.servers,
                searches: dns.searches,
                options: dns.options,
            }),
        port_mappings: config
            .port_mappings
            .iter()
            .map(port_mapping)
            .collect::<Result<_, _>>()?,
        bandwidth: bandwidth(&config.annotations)?,
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        sysctls: linux.sysctls.into_iter().collect(),
        // Options that are absent are those of an empty message: all POD.
        share_process_namespace: options.pid() == v1::NamespaceMode::Pod,
        user_namespace,
        host_namespaces: host_namespaces(&options),
        cgroup_parent,
        resources: resources::parse(
            "config.linux.resources",
            &linux.resources.unwrap_or_default(),
        )?,
        overhead: resources::parse("config.linux.overhead", &linux.overhead.unwrap_or_default())?,
    })
}

/// The pod's name as a host name. The kubelet always gives one; other clients
/// may have names of pods that are none.
fn derived_hostname(name: &str) -> String {
    let name: String = name
        .chars()
        .map(|c| {
            let fine = u8::try_from(c).is_ok_and(is_of_hostname);
            if fine { c } else { '-' }
        })
        .take(MAX_DERIVED_HOSTNAME)
        .collect();
    match name.trim_matches(['-', '.']) {
        "" => "pod".to_owned(),
        name => name.to_owned(),
    }
}

fn is_of_hostname(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_')
}

/// Which of the node's namespaces are asked for.
pub fn host_namespaces(options: &v1::NamespaceOption) -> HostNamespaces {
    let is_node = |mode| mode == v1::NamespaceMode::Node;
    HostNamespaces {
        network: is_node(options.network()),
        ipc: is_node(options.ipc()),
        pid: is_node(options.pid()),
    }
}

pub fn absolute(field: &str, path: &str) -> Result<Option<PathBuf>, Status> {
    if path.is_empty() {
        return Ok(None);
    }
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(invalid(
            field,
            format_args!("{path:?} is not an absolute path"),
        ));
    }
    Ok(Some(path))
}

fn port_mapping(mapping: &v1::PortMapping) -> Result<PortMapping, Status> {
    let port = |name: &str, value: i32| {
        u16::try_from(value).map_err(|_| {
            invalid(
                &format!("config.port_mappings.{name}"),
                format_args!("{value} is no port"),
            )
        })
    };
    if !mapping.host_ip.is_empty() && mapping.host_ip.parse::<IpAddr>().is_err() {
        let why = format_args!("{:?} is no IP address", mapping.host_ip).to_string();
        return Err(invalid("config.port_mappings.host_ip", why));
    }
    let container_port = port("container_port", mapping.container_port)?;
    let host_port = port("host_port", mapping.host_port)?;
    if host_port != 0 && container_port == 0 {
        return Err(invalid(
            "config.port_mappings.container_port",
            format_args!("is 0 beside host port {host_port}"),
        ));
    }
    Ok(PortMapping {
        protocol: match mapping.protocol() {
            v1::Protocol::Tcp => Protocol::Tcp,
            v1::Protocol::Udp => Protocol::Udp,
            v1::Protocol::Sctp => Protocol::Sctp,
        },
        container_port,
        host_port,
        host_ip: mapping.host_ip.clone(),
    })
}

fn bandwidth(annotations: &std::collections::HashMap<String, String>) -> Result<Bandwidth, Status> {
    let rate = |name: &str| {
        annotations
            .get(name)
            .map(|text| {
                quantity(text).ok_or_else(|| {
                    invalid(
                        &format!("annotation {name}"),
                        format_args!("{text:?} is no quantity such as 10M"),
                    )
                })
            })
            .transpose()
    };
    Ok(Bandwidth {
        ingress_bits: rate("kubernetes.io/ingress-bandwidth")?,
        egress_bits: rate("kubernetes.io/egress-bandwidth")?,
    })
}

/// A Kubernetes quantity without fractions: digits and an SI or binary suffix.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: u64 = match &text[digits.len()..] {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

pub fn state(pod: &PodSnapshot) -> v1::PodSandboxState {
    if pod.is_ready() {
        v1::PodSandboxState::SandboxReady
    } else {
        v1::PodSandboxState::SandboxNotready
    }
}

pub fn metadata(pod: &PodSnapshot) -> v1::PodSandboxMetadata {
    let name = &pod.pod.spec.name;
    v1::PodSandboxMetadata {
        name: name.name.clone(),
        uid: name.uid.clone(),
        namespace: name.namespace.clone(),
        attempt: name.attempt,
    }
}

pub fn listed(pod: &PodSnapshot) -> v1::PodSandbox {
    let spec = &pod.pod.spec;
    v1::PodSandbox {
        id: pod.pod.id.clone(),
        metadata: Some(metadata(pod)),
        state: state(pod).into(),
        created_at: pod.pod.created_at_nanos,
        labels: spec.labels.clone().into_iter().collect(),
        annotations: spec.annotations.clone().into_iter().collect(),
        runtime_handler: spec.handler.clone(),
    }
}

fn of_pod(on_host: bool) -> v1::NamespaceMode {
    if on_host {
        v1::NamespaceMode::Node
    } else {
        v1::NamespaceMode::Pod
    }
}

pub fn status(pod: &PodSnapshot) -> v1::PodSandboxStatus {
    let spec = &pod.pod.spec;
    let ips = pod
        .pod
        .network
        .as_ref()
        .map(|network| network.ips.clone())
        .unwrap_or_default();
    let mut ips = if pod.is_ready() { ips } else { Vec::new() }.into_iter();
    v1::PodSandboxStatus {
        id: pod.pod.id.clone(),
        metadata: Some(metadata(pod)),
        state: state(pod).into(),
        created_at: pod.pod.created_at_nanos,
        network: Some(v1::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| v1::PodIp { ip }).collect(),
        }),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace {
                options: Some(v1::NamespaceOption {
                    network: of_pod(spec.host_namespaces.network).into(),
                    pid: match (spec.host_namespaces.pid, spec.share_process_namespace) {
                        (true, _) => v1::NamespaceMode::Node.into(),
                        (false, true) => v1::NamespaceMode::Pod.into(),
                        (false, false) => v1::NamespaceMode::Container.into(),
                    },
                    ipc: of_pod(spec.host_namespaces.ipc).into(),
                    userns_options: spec.user_namespace.map(userns::show_namespace),
                    ..v1::NamespaceOption::default()
                }),
            }),
        }),
        labels: spec.labels.clone().into_iter().collect(),
        annotations: spec.annotations.clone().into_iter().collect(),
        runtime_handler: spec.handler.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "web".into(),
                namespace: "default".into(),
                uid: "u1".into(),
                attempt: 0,
            }),
            ..v1::PodSandboxConfig::default()
        }
    }

    #[test]
    fn a_refused_field_is_named() {
        let refused = |change: fn(&mut v1::PodSandboxConfig)| {
            let mut config = config();
            change(&mut config);
            parse(config, String::new())
                .unwrap_err()
                .message()
                .to_owned()
        };
        assert!(refused(|c| c.metadata = None).starts_with("config.metadata"));
        assert!(refused(|c| c.log_directory = "logs".into()).starts_with("config.log_directory"));
        assert!(refused(|c| c.hostname = "h".repeat(65)).starts_with("config.hostname"));
        assert!(refused(|c| c.hostname = "a b".into()).starts_with("config.hostname"));
        let port = |c: &mut v1::PodSandboxConfig| {
            c.port_mappings = vec![v1::PortMapping {
                host_port: 70_000,
                ..Default::default()
            }];
        };
        assert!(refused(port).contains("70000 is no port"));
        let to_no_port = |c: &mut v1::PodSandboxConfig| {
            c.port_mappings = vec![v1::PortMapping {
                host_port: 8080,
                ..Default::default()
            }];
        };
        let refused_port = refused(to_no_port);
        assert!(refused_port.starts_with("config.port_mappings.container_port"));
        let annotation = |c: &mut v1::PodSandboxConfig| {
            c.annotations
                .insert("kubernetes.io/ingress-bandwidth".into(), "fast".into());
        };
        assert!(refused(annotation).contains("\"fast\" is no quantity"));
    }

    #[test]
    fn the_pods_name_is_its_hostname_unless_one_is_given() {
        let hostname = |name: &str| {
            let mut config = config();
            config.metadata.get_or_insert_default().name = name.to_owned();
            parse(config, String::new()).unwrap().hostname
        };
        assert_eq!(hostname("web"), "web");
        assert_eq!(hostname(&"n".repeat(100)), "n".repeat(63));
        // Where the cut leaves what no host name ends with.
        assert_eq!(
            hostname(&format!("{}-.web", "n".repeat(61))),
            "n".repeat(61)
        );
        assert_eq!(hostname("a pod/ü"), "a-pod");
        assert_eq!(hostname("ü"), "pod");
        let mut given = config();
        given.hostname = "h".repeat(64);
        let given = parse(given, String::new()).unwrap();
        assert_eq!(given.hostname, "h".repeat(64));
    }

    #[test]
    fn absent_namespace_options_mean_that_processes_are_shared() {
        let shares = |pid: Option<v1::NamespaceMode>| {
            let mut config = config();
            let linux = config.linux.get_or_insert_default();
            let security = linux.security_context.get_or_insert_default();
            security.namespace_options = pid.map(|pid| v1::NamespaceOption {
                pid: pid.into(),
                ..Default::default()
            });
            let pod = parse(config, String::new()).unwrap();
            pod.share_process_namespace
        };
        assert!(shares(None) && shares(Some(v1::NamespaceMode::Pod)));
        assert!(!shares(Some(v1::NamespaceMode::Container)));
        assert!(
            parse(config(), String::new())
                .unwrap()
                .share_process_namespace
        );
    }

    #[test]
    fn quantities_have_si_and_binary_suffixes() {
        assert_eq!(quantity("10M"), Some(10_000_000));
        assert_eq!(quantity("1Gi"), Some(1 << 30));
        assert_eq!(quantity("M"), None);
        assert_eq!(quantity("99999999999999999999"), None);
        assert_eq!(quantity("99999999999T"), None);
    }
}
