//! Which system calls of the node's kernel a process or thread may make.
//!
//! A [`List`] says it for one role by the calls' names, with conditions on
//! arguments where a call is harmless only with some; a [`Program`] is the list
//! as the kernel takes it (seccomp(2)). A filter stays for good, goes to all
//! children, and further ones only take away.
//!
//! | whose | list | a call that it lacks |
//! | --- | --- | --- |
//! | the monitor's threads, the file server | [`of`] their [`Role`] | EPERM, and the pod ends: [`trap`] |
//! | the process of a `uml` guest's kernel | [`uml`] | EPERM, and what becomes of it says so: [`Refusals`] |
//!
//! The crate `seccompiler` does the same and cannot serve here: it kills on a
//! call of another architecture, which a guest's program may make; it has one
//! answer for all that is refused, where clone3 needs one of its own; and it
//! compares numbers one after the other, which a stub pays several times for
//! each call of a guest's program.

mod calls;
mod program;
mod refusals;
mod roles;
pub mod trap;
pub mod uml;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use nix::errno::Errno;

pub use self::calls::{name, number};
pub use self::program::{Program, can_ask, is_supported};
pub use self::refusals::{Refusals, Refused};
pub use self::roles::{Confine, Role, confine, leave_open, of, of_node};

/// What the kernel does with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Allow,
    Refuse(Errno),
    /// Whoever holds the filter's listener answers; without one, ENOSYS.
    Ask,
    /// SIGSYS is raised in the thread, with this beside it; see [`trap`].
    Trap(u16),
}

/// A condition on one argument. The kernel sees the value alone: what a
/// pointer points at cannot be a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// 0 to 5.
    argument: u8,
    mask: u64,
    value: u64,
}

/// Argument number `argument` of a call, from 0 to 5.
pub const fn arg(argument: u8) -> Argument {
    assert!(argument < 6);
    Argument(argument)
}

pub struct Argument(u8);

impl Argument {
    /// It is a `long` or a size.
    pub const fn is(self, value: u64) -> Check {
        self.masked(u64::MAX, value)
    }

    /// It is an `int`: of its register the kernel reads the lower half.
    pub const fn is_int(self, value: i32) -> Check {
        self.masked(u32::MAX as u64, value.cast_unsigned() as u64)
    }

    /// It has none of `bits`.
    pub const fn has_none_of(self, bits: u64) -> Check {
        self.masked(bits, 0)
    }

    /// Of its bits those of `mask` are as in `value`.
    pub const fn masked(self, mask: u64, value: u64) -> Check {
        Check {
            argument: self.0,
            mask,
            value: value & mask,
        }
    }
}

impl Check {
    fn holds(self, args: &[u64; 6]) -> bool {
        args[usize::from(self.argument)] & self.mask == self.value
    }
}

/// What a list says of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    /// The call is allowed if all checks of one of these hold.
    cases: Vec<Vec<Check>>,
    otherwise: Answer,
}

impl Rule {
    fn judge(&self, args: &[u64; 6]) -> Answer {
        let holds = |case: &Vec<Check>| case.iter().all(|check| check.holds(args));
        if self.cases.iter().any(holds) {
            Answer::Allow
        } else {
            self.otherwise
        }
    }
}

/// The calls of a role.
#[derive(Clone, Debug)]
pub struct List {
    rules: BTreeMap<u32, Rule>,
    /// Of calls that it does not name, and of those of other architectures.
    unnamed: Answer,
}

impl List {
    /// Answers everything by `unnamed`.
    #[must_use]
    pub fn new(unnamed: Answer) -> Self {
        Self {
            rules: BTreeMap::new(),
            unnamed,
        }
    }

    /// Opens calls whatever their arguments are. These cost nothing: the kernel
    /// remembers its answer.
    #[must_use]
    pub fn allow(mut self, names: &[&str]) -> Self {
        for name in names {
            self.set(
                name,
                Rule {
                    cases: vec![Vec::new()],
                    otherwise: self.unnamed,
                },
            );
        }
        self
    }

    /// Opens a call if all checks of one of `cases` hold.
    #[must_use]
    pub fn allow_if(mut self, name: &str, cases: &[&[Check]]) -> Self {
        self.set(
            name,
            Rule {
                cases: cases.iter().map(|case| case.to_vec()).collect(),
                otherwise: self.unnamed,
            },
        );
        self
    }

    /// Refuses calls with an error that their callers know.
    #[must_use]
    pub fn refuse(mut self, names: &[&str], errno: Errno) -> Self {
        for name in names {
            self.set(
                name,
                Rule {
                    cases: Vec::new(),
                    otherwise: Answer::Refuse(errno),
                },
            );
        }
        self
    }

    /// A name of another architecture says nothing on this one.
    fn set(&mut self, name: &str, rule: Rule) {
        let number = number(name);
        assert!(
            number.is_some() || cfg!(not(target_arch = "x86_64")),
            "{name} is no system call"
        );
        if let Some(number) = number {
            let before = self.rules.insert(number, rule);
            assert!(before.is_none(), "{name} is there twice");
        }
    }

    /// The calls that are open, for some arguments at least.
    pub fn open(&self) -> impl Iterator<Item = String> {
        let open = self.rules.iter().filter(|(_, rule)| !rule.cases.is_empty());
        open.map(|(number, _)| name(i64::from(*number)))
    }

    /// How many of those for some arguments only.
    #[must_use]
    pub fn open_for_some(&self) -> usize {
        let some = |rule: &&Rule| !rule.cases.is_empty() && !rule.cases.contains(&Vec::new());
        self.rules.values().filter(some).count()
    }

    /// The same list for whoever has `outer` already: it says nothing of what
    /// that refuses, so that the answer is the one of `outer`.
    #[must_use]
    pub fn below(mut self, outer: &Self) -> Self {
        for (number, rule) in &outer.rules {
            if !rule.cases.is_empty() {
                self.rules.entry(*number).or_insert_with(|| Rule {
                    cases: Vec::new(),
                    otherwise: self.unnamed,
                });
            }
        }
        self.unnamed = Answer::Allow;
        self
    }

    /// What a call of this architecture is answered.
    #[must_use]
    pub fn judge(&self, number: u32, args: &[u64; 6]) -> Answer {
        self.rules
            .get(&number)
            .map_or(self.unnamed, |rule| rule.judge(args))
    }
}
