//! What of a node decides about machines: its CPU and /dev/kvm.

use std::fs::{self, File};
use std::io;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_read_as_the_kernel_shows_it() {
        let cpu = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu svm_lock hypervisor\n";
        let facts = NodeFacts::from_cpuinfo(cpu, Device::Missing);
        let expected = NodeFacts {
            extension: None,
            vendor: Vendor::Amd,
            is_virtual: true,
            device: Device::Missing,
        };
        assert_eq!(facts, expected);
        let facts = NodeFacts::from_cpuinfo(&cpu.replace("svm_lock", "svm"), Device::Missing);
        assert_eq!(facts.extension, Some("svm"));
    }
}
