//! Which machine runs a handler's pods: decided when the daemon starts, from
//! what the operator asked for, the CPU, /dev/kvm, the handler's kernel, and
//! what the handler's pods have had so far ([`Kept`]).
//!
//! ```text
//! auto:  nothing, uml ──kvm works──▶ kvm ──kvm works no more──▶ withheld
//!                                     ▲          │ │
//!                                     └─it works─┘ └─`machine: uml`─▶ uml
//! ```
//! Pods of a handler that is withheld are refused: what stood between them and
//! the node would be less than before, and nobody has said that it may be.

mod kept;
mod kernel;
mod node;

use std::path::{Path, PathBuf};

use serde::Serialize;
use vmm_client::Machine;

pub use self::kept::{Had, Kept};
use self::kernel::{Kernel, kind_of};
pub use self::node::{DEVICE, Device, NodeFacts, Vendor};
use crate::config::{MachineChoice, RuntimeConfig};

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
    /// Whether pods are refused because they would get less than they have had.
    pub withheld: bool,
    /// What they have had when this was decided.
    #[serde(skip)]
    pub had: Had,
}

impl RuntimeConfig {
    /// The machine and the kernel that pods of this handler get on `node`,
    /// where they have `had` another or the same.
    #[must_use]
    pub fn decide(&self, node: &NodeFacts, had: &Had) -> Decision {
        self.decide_with(node, had, kind_of)
    }

    fn decide_with(&self, node: &NodeFacts, had: &Had, kind: impl Fn(&Path) -> Kernel) -> Decision {
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
            withheld: false,
            had: had.clone(),
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
            MachineChoice::Auto => {
                let (lacks, remedy) = match (node.kvm(), kvm_kernel) {
                    (Ok(found), Ok(())) => {
                        let why = format!("auto: {found}");
                        return decision(Machine::Kvm, "kvm", why, None, true);
                    }
                    (Ok(_), Err(why)) => (why, install()),
                    (Err(lacks), _) => lacks,
                };
                if let Some((promise, way_out)) = had.promise() {
                    let why = format!("{promise}, which does not work now: {lacks}");
                    let remedy = Some(format!("{remedy}; or {way_out}"));
                    return Decision {
                        withheld: true,
                        ..decision(Machine::Kvm, "kvm", why, remedy, false)
                    };
                }
                match uml_kernel {
                    Ok(()) => decision(uml, "uml", format!("auto: {lacks}"), Some(remedy), true),
                    Err(_) if node.kvm().is_ok() => {
                        decision(Machine::Kvm, "kvm", lacks, Some(remedy), false)
                    }
                    Err(why) => {
                        let why = format!("{lacks}; and for uml {why}");
                        decision(uml, "uml", why, Some(install()), false)
                    }
                }
            }
        }
    }

    /// Where pods of this handler are refused by `decision`: the decision as it
    /// is now, unless kvm works again.
    #[must_use]
    pub fn still_withheld(&self, decision: &Decision) -> Option<Decision> {
        if !decision.withheld {
            return None;
        }
        let now = self.decide(&NodeFacts::read(), &decision.had);
        now.withheld.then_some(now)
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
        decide_after(choice, kernel, node, &Had::Nothing)
    }

    fn decide_after(choice: MachineChoice, kernel: &str, node: &NodeFacts, had: &Had) -> Decision {
        let runtime = RuntimeConfig {
            machine: choice,
            kernel: kernel.into(),
            ..RuntimeConfig::default()
        };
        runtime.decide_with(node, had, by_name)
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
    fn what_has_had_kvm_does_not_get_uml_by_itself() {
        let had = Had::Kvm("auto: the CPU has svm and /dev/kvm opens".into());
        let after =
            |choice, kernel: &str, node: &NodeFacts| decide_after(choice, kernel, node, &had);
        let gone = node(Some("svm"), Device::Missing);
        for (kernel, node, found, remedy) in [
            ("/k-{machine}", &gone, "no /dev/kvm", "modprobe kvm_amd"),
            (
                "/k-{machine}",
                &node(None, Device::Missing),
                "neither vmx nor svm",
                "nested virtualisation",
            ),
            // The node could; the file is gone.
            (
                "/own-uml",
                &node(Some("svm"), Device::Opens),
                "/own-uml",
                "set `kernel`",
            ),
            // Nor would uml work.
            ("/own-kvm", &gone, "no /dev/kvm", "modprobe kvm_amd"),
        ] {
            let decision = after(MachineChoice::Auto, kernel, node);
            assert_eq!(decision.machine, Machine::Kvm);
            assert!(!decision.usable && decision.withheld, "{decision:?}");
            let why = &decision.why;
            assert!(why.contains("/dev/kvm opens"), "what it had: {why}");
            assert!(why.contains(found), "what is gone: {why}");
            let told = decision.remedy.unwrap();
            assert!(told.contains(remedy), "{told}");
            assert!(told.contains("`machine: uml`"), "{told}");
        }
        // It is back; or somebody says that it need not be.
        let back = after(
            MachineChoice::Auto,
            "/k-{machine}",
            &node(Some("svm"), Device::Opens),
        );
        assert_eq!((back.machine, back.usable), (Machine::Kvm, true));
        let said = after(MachineChoice::Uml, "/k-{machine}", &gone);
        assert_eq!((said.machine, said.usable), (UML, true));
        assert!(!back.withheld && !said.withheld);
    }

    #[test]
    fn what_may_have_had_kvm_does_not_get_uml_either() {
        let had = Had::Unknown("\"/x/machines.json\" cannot be read: broken".into());
        let decision = decide_after(
            MachineChoice::Auto,
            "/k-{machine}",
            &node(None, Device::Missing),
            &had,
        );
        assert!(decision.withheld && !decision.usable);
        assert!(
            decision.why.contains("may have had kvm"),
            "{}",
            decision.why
        );
        assert!(
            decision.why.contains("/x/machines.json"),
            "{}",
            decision.why
        );
        let kvm = node(Some("vmx"), Device::Opens);
        let decision = decide_after(MachineChoice::Auto, "/k-{machine}", &kvm, &had);
        assert_eq!((decision.machine, decision.usable), (Machine::Kvm, true));
    }

    #[test]
    fn uml_becomes_kvm_where_that_works() {
        let kvm = node(Some("vmx"), Device::Opens);
        let decision = decide_after(MachineChoice::Auto, "/k-{machine}", &kvm, &Had::Uml);
        assert_eq!((decision.machine, decision.usable), (Machine::Kvm, true));
        let none = node(None, Device::Missing);
        let decision = decide_after(MachineChoice::Auto, "/k-{machine}", &none, &Had::Uml);
        assert_eq!((decision.machine, decision.usable), (UML, true));
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
}
