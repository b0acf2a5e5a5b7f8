//! What of files, network and signals a process of the pod may still ask the
//! node's kernel for (landlock(7)): a second wall behind its roots and
//! namespaces, which holds where those turn out to have a hole.
//!
//! What the node's kernel does not know is left out, and told ([`Enforced`]).

use std::os::fd::{AsFd, BorrowedFd};

use landlock::{
    Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use vmm_client::{LANDLOCK_ASKED, Machine};

use super::{JailError, RUN_DIR, TMP_DIR};

/// What the monitor and what it starts may still open.
///
/// | | kvm | uml |
/// | --- | --- | --- |
/// | the three device files | read, write | read, write |
/// | the processes of the pod | | read |
/// | about the CPU | | read |
/// | its devices' sockets | | make, remove |
/// | the guest's memory | | all but devices and sockets |
/// | the guest's kernel, initramfs | | run, read |
pub(super) fn restrict_monitor(
    machine: Machine,
    kernel: BorrowedFd<'_>,
    initramfs: BorrowedFd<'_>,
) -> Result<Enforced, JailError> {
    let read = AccessFs::ReadFile;
    let mut rules = Rules::new()?.rule("/dev", read | AccessFs::WriteFile)?;
    if let Machine::Uml(_) = machine {
        let memory = AccessFs::from_file(LANDLOCK_ASKED)
            | AccessFs::ReadDir
            | AccessFs::MakeReg
            | AccessFs::MakeDir
            | AccessFs::RemoveFile
            | AccessFs::RemoveDir;
        let sockets = AccessFs::MakeSock | AccessFs::RemoveFile;
        rules = rules
            .rule("/pids", read | AccessFs::ReadDir)?
            .rule("/proc/cpuinfo", read)?
            .rule(RUN_DIR, sockets)?
            .rule(TMP_DIR, memory & !AccessFs::IoctlDev)?
            .rule_of_fd(kernel, read | AccessFs::Execute)?
            .rule_of_fd(initramfs, read)?;
    }
    rules.enforce()
}

/// Everything below its root but devices and running programs.
pub(super) fn restrict_file_server() -> Result<Enforced, JailError> {
    let refused = AccessFs::Execute | AccessFs::MakeBlock | AccessFs::IoctlDev;
    // An overlay's mark of a deleted file is a character device: that no other
    // is made is for the checks of requests to see to, and for the missing
    // capability.
    Rules::new()?
        .rule("/", AccessFs::from_all(LANDLOCK_ASKED) & !refused)?
        .enforce()
}

/// How much of what was asked for is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforced {
    Fully,
    /// The node's kernel knows a part of it: it is older than Linux 6.12.
    Partly,
    /// It has no Landlock, has it turned off, or is older than Linux 5.19, whose
    /// Landlock lets nobody rename a file into another directory.
    No,
}

impl Enforced {
    /// What is lacking, as a clause.
    pub fn lacks(self) -> Option<&'static str> {
        match self {
            Self::Fully => None,
            Self::Partly => {
                Some("the node's kernel has a part of Landlock only, less than that of Linux 6.12")
            }
            Self::No => Some("the node's kernel has no Landlock, or less than that of Linux 5.19"),
        }
    }
}

/// None where the node's kernel has none that could be used.
struct Rules(Option<RulesetCreated>);

impl Rules {
    /// Nothing is allowed of all that is asked for.
    fn new() -> Result<Self, JailError> {
        let asked = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::Refer);
        let Ok(asked) = asked else {
            return Ok(Self(None));
        };
        let create = || {
            asked
                .set_compatibility(CompatLevel::BestEffort)
                .handle_access(AccessFs::from_all(LANDLOCK_ASKED))?
                .handle_access(AccessNet::from_all(LANDLOCK_ASKED))?
                .scope(Scope::from_all(LANDLOCK_ASKED))?
                .create()
        };
        Ok(Self(Some(create().map_err(failed)?)))
    }

    fn rule(self, path: &str, access: impl Into<BitFlags<AccessFs>>) -> Result<Self, JailError> {
        let opened = PathFd::new(path).map_err(|source| JailError::Path {
            step: "restrict itself by Landlock: open",
            path: path.into(),
            source: std::io::Error::other(source),
        })?;
        self.rule_of_fd(opened.as_fd(), access)
    }

    fn rule_of_fd(
        self,
        fd: BorrowedFd<'_>,
        access: impl Into<BitFlags<AccessFs>>,
    ) -> Result<Self, JailError> {
        let Some(rules) = self.0 else {
            return Ok(self);
        };
        let rules = rules.add_rule(PathBeneath::new(fd, access));
        Ok(Self(Some(rules.map_err(failed)?)))
    }

    fn enforce(self) -> Result<Enforced, JailError> {
        let Some(rules) = self.0 else {
            return Ok(Enforced::No);
        };
        Ok(match rules.restrict_self().map_err(failed)?.ruleset {
            RulesetStatus::FullyEnforced => Enforced::Fully,
            RulesetStatus::PartiallyEnforced => Enforced::Partly,
            RulesetStatus::NotEnforced => Enforced::No,
        })
    }
}

fn failed(source: RulesetError) -> JailError {
    JailError::Step {
        step: "restrict itself by Landlock",
        source: std::io::Error::other(source),
    }
}
