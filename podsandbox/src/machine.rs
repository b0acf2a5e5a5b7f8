//! Which machine runs a handler's pods: decided once, from what the operator
//! asked for, the CPU, /dev/kvm and the handler's kernel.

mod kernel;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use vmm_client::Machine;

use self::kernel::{Kernel, kind_of};
use crate::config::{MachineChoice, RuntimeConfig};

/// Where the kernel offers its virtual machines.
pub const DEVICE: &str = "/dev/kvm";

/// What this node can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// `vmx` or `svm`.
    pub extension: Option<&'static str>,
    pub vendor: Vendor,
    /// The node is a virtual machine itself.
    pub is_virtual: bool,
    pub device: Device,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    Intel,
    Amd,
    Other,
}

/// [`DEVICE`], opened for reading and writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    Opens,
    Missing,
    Refused(String),
}

/// The machine of one handler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    pub machine: Machine,
    pub kernel: PathBuf,
    /// One clause for logs and people.
    pub why: String,
    /// What would make kvm work here, where it was wanted or would be better.
    pub remedy: Option<String>,
    /// Whether pods can start.
    pub usable: bool,
}

impl NodeFacts {
    #[must_use]
    pub fn read() -> Self {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let device = match File::options().read(true).write(true).open(DEVICE) {
            Ok(_) => Device::Opens,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Device::Missing,
            Err(error) => Device::Refused(error.to_string()),
        };
        Self::from_cpuinfo(&cpu, device)
    }

    fn from_cpuinfo(cpu: &str, device: Device) -> Self {
        let field = |name: &str| {
            cpu.lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| key.trim() == name)
                .map_or("", |(_, value)| value.trim())
        };
        let has = |flag: &str| field("flags").split_whitespace().any(|f| f == flag);
        Self {
            extension: ["vmx", "svm"].into_iter().find(|flag| has(flag)),
            vendor: match field("vendor_id") {
                "GenuineIntel" => Vendor::Intel,
                "AuthenticAMD" | "HygonGenuine" => Vendor::Amd,
                _ => Vendor::Other,
            },
            is_virtual: has("hypervisor"),
            device,
        }
    }

    /// Whether kvm runs an ordinary guest here, as what was found; or what is
    /// in the way and the remedy.
    pub fn kvm(&self) -> Result<String, (String, String)> {
        let module = match self.vendor {
            Vendor::Intel => "kvm_intel",
            Vendor::Amd => "kvm_amd",
            Vendor::Other => "kvm",
        };
        let (found, remedy) = match (self.extension, &self.device) {
            (Some(flag), Device::Opens) => {
                return Ok(format!("the CPU has {flag} and {DEVICE} opens"));
            }
            (Some(flag), Device::Missing) => (
                format!("the CPU has {flag} but there is no {DEVICE}"),
                format!("modprobe {module}; in a container, hand it the device"),
            ),
            (Some(flag), Device::Refused(error)) => (
                format!("the CPU has {flag} but {DEVICE} does not open: {error}"),
                format!("run drupe as root and let its device cgroup have {DEVICE} (10:232)"),
            ),
            (None, Device::Opens) => (
                format!(
                    "{DEVICE} opens but the CPU shows neither vmx nor svm: a paravirtual KVM (PVM) host, which cannot run an ordinary guest kernel"
                ),
                "use a node with (nested) hardware virtualisation; or, with a guest kernel made for PVM, set machine: kvm".to_owned(),
            ),
            (None, _) if self.is_virtual => (
                "this node is a virtual machine whose CPU shows neither vmx nor svm".to_owned(),
                "turn on nested virtualisation for this node".to_owned(),
            ),
            (None, _) => (
                "the CPU shows neither vmx nor svm".to_owned(),
                "turn on virtualisation (VT-x, AMD-V) in the node's firmware".to_owned(),
            ),
        };
        Err((found, remedy))
    }
}

impl RuntimeConfig {
    /// The machine and the kernel that pods of this handler get on `node`.
    #[must_use]
    pub fn decide(&self, node: &NodeFacts) -> Decision {
        self.decide_with(node, kind_of)
    }

    fn decide_with(&self, node: &NodeFacts, kind: impl Fn(&Path) -> Kernel) -> Decision {
        let uml = Machine::Uml(self.uml_mode);
        let kernel = |name| self.kernel_for(name);
        let kvm_kernel = fits(&kernel("kvm"), Machine::Kvm, &kind);
        let uml_kernel = fits(&kernel("uml"), uml, &kind);
        let install = || "install the guest kernel or set `kernel`".to_owned();
        let decision = |machine, name, why: String, remedy, usable| Decision {
            machine,
            kernel: kernel(name),
            why,
            remedy,
            usable,
        };
        match self.machine {
            MachineChoice::Uml => match uml_kernel {
                Ok(()) => decision(uml, "uml", "as configured".into(), None, true),
                Err(why) => decision(uml, "uml", why, Some(install()), false),
            },
            MachineChoice::Kvm => match (&node.device, kvm_kernel) {
                (_, Err(why)) => decision(Machine::Kvm, "kvm", why, Some(install()), false),
                // The operator knows of a kernel that a PVM host can run.
                (Device::Opens, Ok(())) => {
                    decision(Machine::Kvm, "kvm", "as configured".into(), None, true)
                }
                (_, Ok(())) => {
                    let (why, remedy) = node.kvm().err().unwrap_or_default();
                    decision(Machine::Kvm, "kvm", why, Some(remedy), false)
                }
            },
            MachineChoice::Auto => match (node.kvm(), kvm_kernel, uml_kernel) {
                (Ok(found), Ok(()), _) => {
                    decision(Machine::Kvm, "kvm", format!("auto: {found}"), None, true)
                }
                (Ok(_), Err(why), Ok(())) => {
                    decision(uml, "uml", format!("auto: {why}"), Some(install()), true)
                }
                (Err((found, remedy)), _, Ok(())) => {
                    decision(uml, "uml", format!("auto: {found}"), Some(remedy), true)
                }
                (Ok(_), Err(why), Err(_)) => {
                    decision(Machine::Kvm, "kvm", why, Some(install()), false)
                }
                (Err((found, _)), _, Err(why)) => {
                    let why = format!("{found}; and for uml {why}");
                    decision(uml, "uml", why, Some(install()), false)
                }
            },
        }
    }

    /// The handler's kernel for a machine: `{machine}` in its path stands for
    /// the machine's name.
    fn kernel_for(&self, machine: &str) -> PathBuf {
        match self.kernel.to_str() {
            Some(path) => path.replace("{machine}", machine).into(),
            None => self.kernel.clone(),
        }
    }
}

/// Fails with a sentence that names `kernel` unless `machine` can run it.
pub fn check_kernel(kernel: &Path, machine: Machine) -> Result<(), String> {
    fits(kernel, machine, kind_of)
}

fn fits(path: &Path, machine: Machine, kind: impl Fn(&Path) -> Kernel) -> Result<(), String> {
    match (machine, kind(path)) {
        (Machine::Kvm, Kernel::Kvm) | (Machine::Uml(_), Kernel::Uml) => Ok(()),
        (Machine::Kvm, Kernel::Uml) => Err(format!(
            "{path:?} is no kernel for kvm: it has no PVH entry and is no bzImage"
        )),
        (Machine::Uml(_), Kernel::Kvm) => Err(format!("{path:?} is a kernel for kvm")),
        (_, Kernel::No(why)) => Err(why),
    }
}

#[cfg(test)]
mod tests {
    use vmm_client::UmlMode;

    use super::*;

    const UML: Machine = Machine::Uml(UmlMode::Seccomp);

    fn node(extension: Option<&'static str>, device: Device) -> NodeFacts {
        NodeFacts {
            extension,
            vendor: Vendor::Amd,
            is_virtual: true,
            device,
        }
    }

    fn by_name(path: &Path) -> Kernel {
        match path.to_str() {
            Some(path) if path.ends_with("kvm") => Kernel::Kvm,
            Some(path) if path.ends_with("uml") => Kernel::Uml,
            _ => Kernel::No(format!("{path:?} is no kernel")),
        }
    }

    fn decide(choice: MachineChoice, kernel: &str, node: &NodeFacts) -> Decision {
        let runtime = RuntimeConfig {
            machine: choice,
            kernel: kernel.into(),
            ..RuntimeConfig::default()
        };
        runtime.decide_with(node, by_name)
    }

    #[test]
    fn auto_takes_kvm_where_it_works_and_says_why() {
        let decision = decide(
            MachineChoice::Auto,
            "/k-{machine}",
            &node(Some("svm"), Device::Opens),
        );
        assert_eq!(decision.machine, Machine::Kvm);
        assert_eq!(decision.kernel, Path::new("/k-kvm"));
        assert_eq!(decision.why, "auto: the CPU has svm and /dev/kvm opens");
        assert!(decision.usable);
    }

    #[test]
    fn auto_takes_uml_elsewhere_and_names_the_remedy() {
        let refused = Device::Refused("Permission denied".into());
        for (extension, device, remedy) in [
            (Some("svm"), Device::Missing, "modprobe kvm_amd"),
            (Some("vmx"), refused, "device cgroup"),
            (None, Device::Opens, "made for PVM"),
            (None, Device::Missing, "nested virtualisation"),
        ] {
            let decision = decide(
                MachineChoice::Auto,
                "/k-{machine}",
                &node(extension, device),
            );
            assert_eq!(decision.machine, UML);
            assert_eq!(decision.kernel, Path::new("/k-uml"));
            assert!(decision.usable);
            let told = decision.remedy.unwrap();
            assert!(told.contains(remedy), "{told}");
        }
    }

    #[test]
    fn a_handlers_own_kernel_decides_for_its_machine() {
        let able = node(Some("vmx"), Device::Opens);
        let decision = decide(MachineChoice::Auto, "/own-uml", &able);
        assert_eq!((decision.machine, decision.usable), (UML, true));
        let decision = decide(MachineChoice::Auto, "/own-kvm", &able);
        assert_eq!((decision.machine, decision.usable), (Machine::Kvm, true));
        let decision = decide(
            MachineChoice::Auto,
            "/own-kvm",
            &node(None, Device::Missing),
        );
        assert!(!decision.usable);
        assert!(decision.why.contains("/own-kvm"), "{}", decision.why);
    }

    #[test]
    fn what_was_configured_is_taken_or_refused_never_replaced() {
        let pvm = node(None, Device::Opens);
        let decision = decide(MachineChoice::Kvm, "/k-kvm", &pvm);
        assert_eq!((decision.machine, decision.usable), (Machine::Kvm, true));
        let decision = decide(MachineChoice::Kvm, "/k-kvm", &node(None, Device::Missing));
        assert_eq!((decision.machine, decision.usable), (Machine::Kvm, false));
        let decision = decide(MachineChoice::Uml, "/k-kvm", &pvm);
        assert_eq!((decision.machine, decision.usable), (UML, false));
    }

    #[test]
    fn the_cpu_is_read_as_the_kernel_shows_it() {
        let cpu = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu svm_lock hypervisor\n";
        let facts = NodeFacts::from_cpuinfo(cpu, Device::Missing);
        assert_eq!(facts, node(None, Device::Missing));
        let facts = NodeFacts::from_cpuinfo(&cpu.replace("svm_lock", "svm"), Device::Missing);
        assert_eq!(facts.extension, Some("svm"));
    }
}
