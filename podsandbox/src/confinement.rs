//! What of pods' confinement the node's kernel has, as far as it is known before
//! a pod starts: seccomp filters, Landlock, core scheduling. Looked at once, when
//! the daemon starts; `drupe check` shows it.
//!
//! Whether a pod is refused for what is lacking is the operator's to say
//! ([`Confinement`]). The monitor finds out by itself, too, and has the last
//! word.

use std::fmt;
use std::fs;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    Scope,
};
use rustix::io::Errno;
use rustix::process::getpid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
use vmm_client::{LANDLOCK_ASKED, has_hyperthreads};

use crate::cgroup;
use crate::config::RuntimeConfig;

pub use vmm_client::Confinement;

/// The answers that filters of this kernel can give (seccomp(2)), by name.
const ANSWERS: &str = "/proc/sys/kernel/seccomp/actions_avail";
/// Those that pods' and unpackers' filters give.
const NEEDED: [&str; 4] = ["allow", "errno", "kill_process", "trap"];
/// By which the monitor learns what the kernel of a `uml` guest is refused.
const ASKS: &str = "user_notif";

/// What each version of Landlock's interface has added, by the Linux that did.
const PARTS: [Part; 6] = [
    Part::new(ABI::V1, "5.13", "files"),
    Part::new(ABI::V2, "5.19", "moving files between directories"),
    Part::new(ABI::V3, "6.2", "truncating files"),
    Part::new(ABI::V4, "6.7", "TCP ports"),
    Part::new(ABI::V5, "6.10", "ioctls of devices"),
    Part::new(ABI::V6, "6.12", "abstract sockets and signals"),
];
/// Below, a process under Landlock moves no file to another directory, as a
/// file server has to: then pods do without all of it.
const USABLE: ABI = ABI::V2;

struct Part {
    since: ABI,
    linux: &'static str,
    guards: &'static str,
}

impl Part {
    const fn new(since: ABI, linux: &'static str, guards: &'static str) -> Self {
        Self {
            since,
            linux,
            guards,
        }
    }
}

/// What of pods' confinement this node's kernel has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facilities {
    /// Answers of seccomp filters; none: it has no filters.
    answers: Vec<String>,
    landlock: ABI,
    cores: Cores,
}

/// Whether pods can be kept apart on the hyperthreads of a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cores {
    Apart,
    /// None are in use on this node.
    WithoutHyperthreads,
    /// The kernel has no core scheduling.
    Shared,
}

/// Something that this node's kernel does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack {
    /// Behind "the node's kernel has".
    pub found: String,
    /// What it means for pods, as a sentence's second half.
    pub meaning: String,
    pub remedy: String,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the node's kernel has {}", self.found)
    }
}

impl Facilities {
    #[must_use]
    pub fn read() -> Self {
        // A kernel without filters has no such file.
        let answers = fs::read_to_string(ANSWERS).unwrap_or_default();
        let known = PARTS.iter().rev().find(|part| is_known(part.since));
        let landlock = known.map_or(ABI::Unsupported, |part| part.since);
        // Of this thread: nobody has more than one, and most have none (0).
        let cookie = core_scheduling_cookie(getpid(), CoreSchedulingScope::Thread);
        let cores = match cookie {
            Ok(_) => Cores::Apart,
            Err(error) if error == Errno::NODEV || !has_hyperthreads() => {
                Cores::WithoutHyperthreads
            }
            Err(_) => Cores::Shared,
        };
        Self::of(&answers, landlock, cores)
    }

    fn of(answers: &str, landlock: ABI, cores: Cores) -> Self {
        Self {
            answers: answers.split_whitespace().map(str::to_owned).collect(),
            landlock,
            cores,
        }
    }

    /// All that pods are to have.
    #[must_use]
    pub fn whole() -> Self {
        let answers = "user_notif allow errno kill_process trap";
        Self::of(answers, LANDLOCK_ASKED, Cores::Apart)
    }

    /// Nothing of it.
    #[must_use]
    pub fn none() -> Self {
        Self::of("", ABI::Unsupported, Cores::Shared)
    }

    /// Filters of system calls, as what was found.
    pub fn filters(&self) -> Result<String, Lack> {
        let missing: Vec<&str> = NEEDED.into_iter().filter(|name| !self.has(name)).collect();
        let remedy = "a kernel of Linux 4.14 or later with CONFIG_SECCOMP_FILTER".to_owned();
        if self.answers.is_empty() {
            return Err(Lack {
                found: "no seccomp filters".to_owned(),
                meaning: "pods' processes and unpackers of images can make all its system calls; \
                          pods on uml start only with `uml_unsealed`"
                    .to_owned(),
                remedy,
            });
        }
        if !missing.is_empty() {
            return Err(Lack {
                found: format!("seccomp filters without {}", missing.join(", ")),
                meaning: "pods may not start".to_owned(),
                remedy,
            });
        }
        Ok(format!("there, with {}", NEEDED.join(", ")))
    }

    /// Whether the calls that the kernel of a `uml` guest is refused are told.
    #[must_use]
    pub fn tells_refusals(&self) -> bool {
        self.has(ASKS)
    }

    fn has(&self, answer: &str) -> bool {
        self.answers.iter().any(|name| name == answer)
    }

    /// Landlock, as what was found.
    pub fn landlock(&self) -> Result<String, Lack> {
        let missing = PARTS.iter().filter(|part| part.since > self.landlock);
        let missing: Vec<&Part> = missing.collect();
        let Some(newest) = missing.last() else {
            return Ok(format!("ABI {LANDLOCK_ASKED}, which is all that is asked"));
        };
        let remedy = format!(
            "Linux {} or later with CONFIG_SECURITY_LANDLOCK, started with landlock in `lsm=`",
            newest.linux
        );
        if self.landlock < USABLE {
            return Err(Lack {
                found: match self.landlock {
                    ABI::Unsupported => "no Landlock, or has it turned off".to_owned(),
                    old => format!("Landlock's ABI {old}, too old to be of use"),
                },
                meaning: "what holds pods' processes is their roots, namespaces and filters alone"
                    .to_owned(),
                remedy,
            });
        }
        let guards: Vec<&str> = missing.iter().map(|part| part.guards).collect();
        Err(Lack {
            found: format!(
                "Landlock's ABI {} of the {LANDLOCK_ASKED} that are asked",
                self.landlock
            ),
            meaning: format!(
                "it does not guard {}; pods' roots, namespaces and filters do",
                guards.join(", ")
            ),
            remedy,
        })
    }

    /// Core scheduling, as what was found.
    pub fn core_scheduling(&self) -> Result<String, Lack> {
        match self.cores {
            Cores::Apart => Ok("pods share no core's hyperthreads".to_owned()),
            Cores::WithoutHyperthreads => Ok("no hyperthreads are in use".to_owned()),
            Cores::Shared => Err(Lack {
                found: "no core scheduling".to_owned(),
                meaning: "pods share the hyperthreads of a core, whatever `core_scheduling` says"
                    .to_owned(),
                remedy:
                    "Linux 5.14 or later with CONFIG_SCHED_CORE, or `nosmt` on its command line"
                        .to_owned(),
            }),
        }
    }

    /// All that it lacks for pods of any of `handlers`.
    pub fn lacks<'a>(&self, handlers: impl IntoIterator<Item = &'a RuntimeConfig>) -> Vec<Lack> {
        let mut lacks = vec![self.filters(), self.landlock()];
        if handlers.into_iter().any(|handler| handler.core_scheduling) {
            lacks.push(self.core_scheduling());
        }
        lacks.into_iter().filter_map(Result::err).collect()
    }
}

/// The controllers of control groups by which pods are limited, as what was
/// found. A group may have less than the node.
pub fn limits() -> Result<String, Lack> {
    let (lacking, all) = cgroup::lacking_controllers();
    if lacking.is_empty() {
        return Ok(format!("limits by {}", all.join(", ")));
    }
    let lacking = lacking.join(", ");
    Err(Lack {
        found: format!("no controller {lacking} for control groups"),
        meaning: format!("pods that have broken out of their guest are not limited by {lacking}"),
        remedy: "mount the controller (cgroup v1) or take it out of `cgroup_disable=` of the \
                 kernel's command line"
            .to_owned(),
    })
}

/// Whether the node's kernel has all of what `abi` has. Restricts nobody.
fn is_known(abi: ABI) -> bool {
    let ask = || -> Result<(), RulesetError> {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(abi))?;
        if abi >= ABI::V4 {
            rules = rules.handle_access(AccessNet::from_all(abi))?;
        }
        if abi >= ABI::V6 {
            rules = rules.scope(Scope::from_all(abi))?;
        }
        rules.create().map(drop)
    };
    ask().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "kill_process kill_thread trap errno user_notif trace log allow\n";

    fn with_cores() -> RuntimeConfig {
        RuntimeConfig {
            core_scheduling: true,
            ..RuntimeConfig::default()
        }
    }

    #[test]
    fn cores_are_lacking_only_for_those_who_want_them_to_themselves() {
        let lacks = |cores, handler| {
            let node = Facilities::of(ALL, LANDLOCK_ASKED, cores);
            node.lacks([&handler]).len()
        };
        assert_eq!(lacks(Cores::Shared, RuntimeConfig::default()), 0);
        assert_eq!(lacks(Cores::Shared, with_cores()), 1);
        assert_eq!(lacks(Cores::WithoutHyperthreads, with_cores()), 0);
    }

    #[test]
    fn a_kernel_that_has_all_lacks_nothing() {
        let node = Facilities::of(ALL, LANDLOCK_ASKED, Cores::Apart);
        assert_eq!(node.lacks([&with_cores()]), []);
        assert!(node.tells_refusals());
        assert!(node.landlock().unwrap().contains("ABI 6"));
        assert_eq!(Facilities::whole().lacks([&with_cores()]), []);
        // All that is asked for has a name.
        assert_eq!(PARTS.last().unwrap().since, LANDLOCK_ASKED);
    }

    #[test]
    fn an_older_landlock_is_told_by_what_it_does_not_guard() {
        let lack = |abi| {
            Facilities::of(ALL, abi, Cores::Apart)
                .landlock()
                .unwrap_err()
        };
        let old = lack(ABI::V3);
        assert_eq!(
            old.to_string(),
            "the node's kernel has Landlock's ABI 3 of the 6 that are asked"
        );
        for word in ["TCP ports", "ioctls of devices", "abstract sockets"] {
            assert!(old.meaning.contains(word), "{old:?}");
        }
        assert!(!old.meaning.contains("truncating"), "{old:?}");
        assert!(old.remedy.contains("Linux 6.12"), "{old:?}");
        let newer = lack(ABI::V5);
        assert!(
            newer.meaning.contains("signals") && !newer.meaning.contains("ioctl"),
            "{newer:?}"
        );
        for none in [ABI::Unsupported, ABI::V1] {
            let lack = lack(none);
            assert!(lack.meaning.contains("alone"), "{lack:?}");
        }
    }

    #[test]
    fn a_kernel_without_filters_is_told_what_that_opens() {
        let none = Facilities::of("", LANDLOCK_ASKED, Cores::Apart);
        let lack = none.filters().unwrap_err();
        assert!(lack.found.contains("no seccomp filters"), "{lack:?}");
        assert!(lack.meaning.contains("uml_unsealed"), "{lack:?}");
        assert!(!none.tells_refusals());
        let old = Facilities::of("trap errno allow", LANDLOCK_ASKED, Cores::Apart);
        let lack = old.filters().unwrap_err();
        assert!(lack.found.contains("kill_process"), "{lack:?}");
    }

    #[test]
    fn this_kernel_is_asked() {
        let node = Facilities::read();
        node.filters().unwrap();
        assert!(node.landlock >= USABLE, "{node:?}");
    }
}
