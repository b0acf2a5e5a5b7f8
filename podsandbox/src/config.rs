//! What the operator decides about pods. The daemon's YAML embeds these.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmm_client::{HugePages, RateLimit, UmlMode};

use crate::confinement::{Confinement, Facilities};
use crate::machine::Decision;
use crate::spec::HostNamespaces;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RuntimeConfig {
    /// The OCI runtime, by name or path, that runs this handler's pods on the
    /// host's kernel. Nothing else is stated beside it.
    pub oci: Option<PathBuf>,
    /// What becomes of pods that share namespaces of the host.
    pub host_namespaces: HostPods,
    pub machine: MachineChoice,
    /// How `uml` confines the guest's processes.
    pub uml_mode: UmlMode,
    /// Whether `uml` may run a guest kernel that keeps the node's system calls
    /// that it needed for its own start.
    pub uml_unsealed: bool,
    /// Whether a pod shares the hyperthreads of a core with nobody at a time.
    pub core_scheduling: bool,
    /// `{machine}` in it stands for `kvm` or `uml`.
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// Words added to the guest kernel's command line.
    pub kernel_args: Vec<String>,
    /// Guest memory of a pod that states no limit.
    pub default_memory_mib: u32,
    /// vCPUs of a pod that states no limit.
    pub default_vcpus: u32,
    /// Pages of the node under a `kvm` guest's memory.
    pub huge_pages: HugePages,
    /// Guest memory on top of the pod's limit where RuntimeClass declares no
    /// overhead: the guest's kernel and the agent live there.
    pub guest_overhead_mib: u32,
    /// How much memory a pod can grow by while it runs. The guest does without
    /// it until then, but keeps a 64th of it to manage it by.
    pub memory_headroom_mib: u32,
    /// Size of the disk that holds what containers write.
    pub scratch_gib: u32,
    /// How many disks a pod can hold at once: one for each container, image
    /// volume and block device of the node.
    pub disk_slots: u32,
    /// What each disk of a pod may move.
    pub disk_limit: RateLimit,
    /// Queues that a pod's network interface has at most: one for each vCPU.
    pub net_queues: u32,
    /// How long a guest may take to report ready.
    pub boot_timeout_seconds: u64,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            oci: None,
            host_namespaces: HostPods::default(),
            machine: MachineChoice::Auto,
            uml_mode: UmlMode::Seccomp,
            uml_unsealed: false,
            core_scheduling: false,
            kernel: "/usr/lib/drupe/kernel-{machine}".into(),
            initramfs: "/usr/lib/drupe/initramfs".into(),
            kernel_args: Vec::new(),
            default_memory_mib: 512,
            default_vcpus: 1,
            huge_pages: HugePages::Off,
            guest_overhead_mib: 64,
            memory_headroom_mib: 0,
            scratch_gib: 10,
            disk_slots: 8,
            disk_limit: RateLimit::default(),
            net_queues: 8,
            boot_timeout_seconds: 30,
        }
    }
}

impl RuntimeConfig {
    /// A handler of pods on the host's kernel.
    #[must_use]
    pub fn on_host(program: &str) -> Self {
        Self {
            oci: Some(program.into()),
            ..Self::default()
        }
    }
}

/// What becomes of pods that a handler of machines cannot run, because they
/// share namespaces of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum HostPods {
    Refuse,
    /// They go to this handler.
    Handler(String),
}

impl HostPods {
    /// No handler can have this name.
    pub const REFUSE: &str = "refuse";
    /// The handler that the default names.
    pub const HANDLER: &str = "host";
}

impl Default for HostPods {
    fn default() -> Self {
        Self::Handler(Self::HANDLER.to_owned())
    }
}

impl From<String> for HostPods {
    fn from(text: String) -> Self {
        if text == Self::REFUSE {
            Self::Refuse
        } else {
            Self::Handler(text)
        }
    }
}

impl From<HostPods> for String {
    fn from(pods: HostPods) -> Self {
        match pods {
            HostPods::Refuse => HostPods::REFUSE.to_owned(),
            HostPods::Handler(name) => name,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineChoice {
    Auto,
    Kvm,
    Uml,
}

/// A handler on this node.
#[derive(Clone, Debug, Serialize)]
pub struct Runtime {
    pub settings: RuntimeConfig,
    pub engine: Engine,
}

/// What runs a handler's pods.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// A machine and its kernel.
    Machine(Decision),
    /// An OCI runtime's program, on the host's kernel.
    Oci(PathBuf),
}

/// Of users and groups, one for each VMM.
pub const UIDS: u32 = 65_536;

/// Where pods live on this node.
#[derive(Clone, Debug)]
pub struct Config {
    /// Persistent: records and scratch disks.
    pub root: PathBuf,
    /// Volatile: sockets, consoles, shared directories.
    pub run_dir: PathBuf,
    pub netns_dir: PathBuf,
    pub vmm: PathBuf,
    /// The supervisor of pods on the host's kernel.
    pub shim: PathBuf,
    /// First of the [`UIDS`] uids and gids that VMMs run under.
    pub uid_base: u32,
    /// What becomes of pods with a kernel of their own where the node lacks a
    /// part of their confinement.
    pub confinement: Confinement,
    /// What of it the node's kernel has.
    pub facilities: Facilities,
    /// Where CDI files are; a later directory wins.
    pub cdi_spec_dirs: Vec<PathBuf>,
    pub default_runtime: String,
    pub runtimes: BTreeMap<String, Runtime>,
}

impl Config {
    /// Fails where a pod's confinement has to be whole and this node's kernel
    /// lacks a part of it, or of what the pod's handler adds.
    pub fn check_confinement(&self, handler: &RuntimeConfig) -> crate::Result<()> {
        let lacks = self.facilities.lacks([handler]);
        if lacks.is_empty() || !self.confinement.is_required() {
            return Ok(());
        }
        let (lacks, remedies) = lacks
            .into_iter()
            .map(|lack| (lack.to_string(), lack.remedy))
            .unzip::<_, _, Vec<_>, Vec<_>>();
        Err(crate::Error::Unconfined {
            lacks: lacks.join(", and "),
            remedy: remedies.join("; "),
        })
    }

    /// The configuration that serves `handler`; empty means the default.
    pub fn runtime(&self, handler: &str) -> crate::Result<(&str, &Runtime)> {
        let name = if handler.is_empty() {
            &self.default_runtime
        } else {
            handler
        };
        self.runtimes
            .get_key_value(name)
            .map(|(k, v)| (k.as_str(), v))
            .ok_or_else(|| crate::Error::UnknownHandler {
                name: name.to_owned(),
                known: self.runtimes.keys().cloned().collect::<Vec<_>>().join(", "),
            })
    }

    /// The handler for a pod that asks for `handler` and shares these
    /// namespaces of the host.
    pub fn runtime_for(
        &self,
        handler: &str,
        wanted: HostNamespaces,
    ) -> crate::Result<(&str, &Runtime)> {
        let (name, runtime) = self.runtime(handler)?;
        if !wanted.any() || matches!(runtime.engine, Engine::Oci(_)) {
            return Ok((name, runtime));
        }
        let handler = || name.to_owned();
        match &runtime.settings.host_namespaces {
            HostPods::Refuse => Err(crate::Error::HostNamespacesRefused {
                handler: handler(),
                wanted,
            }),
            HostPods::Handler(fallback) => match self.runtimes.get_key_value(fallback) {
                Some((name, runtime)) if matches!(runtime.engine, Engine::Oci(_)) => {
                    Ok((name, runtime))
                }
                _ => Err(crate::Error::NoHostHandler {
                    handler: handler(),
                    fallback: fallback.clone(),
                    wanted,
                }),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use vmm_client::Machine;

    use super::*;
    use crate::Error;
    use crate::machine::Had;

    fn config(host_namespaces: HostPods, with_host: bool) -> Config {
        let machine = Engine::Machine(Decision {
            machine: Machine::Kvm,
            kernel: "/kernel".into(),
            why: String::new(),
            remedy: None,
            usable: true,
            withheld: false,
            had: Had::Nothing,
        });
        let microvm = Runtime {
            settings: RuntimeConfig {
                host_namespaces,
                ..RuntimeConfig::default()
            },
            engine: machine,
        };
        let host = Runtime {
            settings: RuntimeConfig::on_host("runc"),
            engine: Engine::Oci("runc".into()),
        };
        let mut runtimes = BTreeMap::from([("microvm".to_owned(), microvm)]);
        if with_host {
            runtimes.insert(HostPods::HANDLER.to_owned(), host);
        }
        let path = |name: &str| Path::new("/").join(name);
        Config {
            root: path("root"),
            run_dir: path("run"),
            netns_dir: path("netns"),
            vmm: path("vmm"),
            shim: path("shim"),
            uid_base: 1,
            confinement: Confinement::default(),
            facilities: Facilities::whole(),
            cdi_spec_dirs: Vec::new(),
            default_runtime: "microvm".to_owned(),
            runtimes,
        }
    }

    #[test]
    fn a_node_that_lacks_a_wall_refuses_pods_only_if_all_are_required() {
        let mut config = config(HostPods::default(), true);
        config.confinement = Confinement::Required;
        let usual = RuntimeConfig::default();
        config.check_confinement(&usual).unwrap();
        config.facilities = Facilities::none();
        let refused = config.check_confinement(&usual).unwrap_err();
        assert_eq!(refused.kind(), crate::ErrorKind::FailedPrecondition);
        let text = refused.sentence();
        for word in ["seccomp", "Landlock", "`confinement: required`"] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert!(!text.contains("core scheduling"), "{text}");
        let apart = RuntimeConfig {
            core_scheduling: true,
            ..RuntimeConfig::default()
        };
        let refused = config.check_confinement(&apart).unwrap_err();
        assert!(refused.sentence().contains("core scheduling"));
        config.confinement = Confinement::BestEffort;
        config.check_confinement(&apart).unwrap();
    }

    #[test]
    fn only_a_pod_of_the_hosts_namespaces_falls_to_the_hosts_handler() {
        let wanted = HostNamespaces {
            network: true,
            ..HostNamespaces::default()
        };
        let chosen = |config: &Config, handler: &str, wanted| {
            let chosen = config.runtime_for(handler, wanted);
            chosen.map(|(name, _)| name.to_owned())
        };
        let usual = config(HostPods::default(), true);
        assert_eq!(
            chosen(&usual, "", HostNamespaces::default()).unwrap(),
            "microvm"
        );
        assert_eq!(chosen(&usual, "", wanted).unwrap(), "host");
        assert_eq!(chosen(&usual, "microvm", wanted).unwrap(), "host");
        let own = HostNamespaces::default();
        assert_eq!(chosen(&usual, "host", own).unwrap(), "host");
        let refused = chosen(&config(HostPods::Refuse, true), "", wanted).unwrap_err();
        assert!(matches!(refused, Error::HostNamespacesRefused { .. }));
        let missing = chosen(&config(HostPods::default(), false), "", wanted).unwrap_err();
        let text = missing.sentence();
        assert!(
            text.contains("network") && text.contains("\"host\""),
            "{text}"
        );
    }
}
