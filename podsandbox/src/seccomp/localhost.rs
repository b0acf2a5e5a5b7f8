//! Seccomp profiles that are files of the node (`Localhost`), in the form that
//! Docker and Podman read, of which the OCI runtime spec's own is a part:
//! rules may depend on capabilities, architecture and kernel.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompBuilder,
    LinuxSeccompFilterFlag, LinuxSyscall, LinuxSyscallBuilder,
};
use serde::Deserialize;

use crate::Result;
use crate::host::features::kernel_version;

/// Default profiles of the field have 20 KiB.
const MAX_BYTES: u64 = 1 << 20;

/// The architecture of guests and hosts, as profiles write it.
const ARCH: (&str, Arch) = ("amd64", Arch::ScmpArchX86_64);

/// What a host runs, each by its name in profiles.
const HOST_ARCHES: [(&str, Arch); 3] = [
    ("SCMP_ARCH_X86_64", Arch::ScmpArchX86_64),
    ("SCMP_ARCH_X86", Arch::ScmpArchX86),
    ("SCMP_ARCH_X32", Arch::ScmpArchX32),
];

/// The oldest kernel that the agent runs on: it hands overlayfs all its
/// directories as descriptors. A rule for a later one is taken as not met.
const OLDEST_GUEST: (u32, u32) = (6, 13);

/// The highest error number of x86, EHWPOISON.
const LAST_ERRNO: i32 = 133;

#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error("cannot be read")]
    Read(#[source] io::Error),
    #[error("is no regular file")]
    NoFile,
    #[error("is larger than {} KiB", MAX_BYTES / 1024)]
    TooLarge,
    #[error("is no seccomp profile")]
    Json(#[source] serde_json::Error),
    #[error("{field} {value:?} {why}")]
    Field {
        field: &'static str,
        value: String,
        why: &'static str,
    },
    #[error("has both {one} and {other}")]
    Both {
        one: &'static str,
        other: &'static str,
    },
    #[error("hands calls to a listener (SCMP_ACT_NOTIFY), which a guest does not have")]
    Notify,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Profile {
    default_action: LinuxSeccompAction,
    default_errno_ret: Option<u32>,
    /// The same by name.
    default_errno: Option<String>,
    architectures: Option<Vec<Arch>>,
    /// The older kinds of machine that each architecture can also run.
    arch_map: Option<Vec<ArchMap>>,
    flags: Option<Vec<LinuxSeccompFilterFlag>>,
    listener_path: Option<PathBuf>,
    syscalls: Option<Vec<Rule>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: String,
    /// Profiles know more of them than this program does.
    sub_architectures: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    name: Option<String>,
    names: Option<Vec<String>>,
    action: LinuxSeccompAction,
    errno_ret: Option<u32>,
    errno: Option<String>,
    args: Option<Vec<LinuxSeccompArg>>,
    includes: Option<Condition>,
    excludes: Option<Condition>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

impl Profile {
    pub fn read(path: &Path) -> std::result::Result<Self, ProfileError> {
        let mut options = File::options();
        // A path that is a FIFO must not hold up the pod.
        options.read(true).custom_flags(nix::libc::O_NONBLOCK);
        let file = options.open(path).map_err(ProfileError::Read)?;
        if !file.metadata().map_err(ProfileError::Read)?.is_file() {
            return Err(ProfileError::NoFile);
        }
        let mut text = Vec::new();
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(ProfileError::Read)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(ProfileError::TooLarge);
        }
        Self::parse(&text)
    }

    fn parse(text: &[u8]) -> std::result::Result<Self, ProfileError> {
        let mut profile: Self = serde_json::from_slice(text).map_err(ProfileError::Json)?;
        let both = |one, other| Err(ProfileError::Both { one, other });
        let some = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
        if some(&profile.architectures) && profile.arch_map.is_some() {
            return both("architectures", "archMap");
        }
        let mut notifies = profile.default_action == LinuxSeccompAction::ScmpActNotify
            || profile.listener_path.is_some();
        name_errno(
            "defaultErrno",
            &profile.default_errno,
            &mut profile.default_errno_ret,
        )?;
        for rule in profile.syscalls.iter_mut().flatten() {
            notifies |= rule.action == LinuxSeccompAction::ScmpActNotify;
            name_errno("errno", &rule.errno, &mut rule.errno_ret)?;
            if let Some(name) = rule.name.take().filter(|name| !name.is_empty()) {
                if rule.names.as_ref().is_some_and(|names| !names.is_empty()) {
                    return both("name", "names");
                }
                rule.names = Some(vec![name]);
            }
            for condition in [&rule.includes, &rule.excludes].into_iter().flatten() {
                condition.check()?;
            }
        }
        if notifies {
            return Err(ProfileError::Notify);
        }
        Ok(profile)
    }

    /// What of it holds in a guest for a container with these capabilities.
    pub fn for_container(&self, held: &HashSet<Capability>) -> Result<LinuxSeccomp> {
        // A guest runs no programs of other kinds.
        self.resolve(held, OLDEST_GUEST, vec![ARCH.1])
    }

    /// The same on the host's kernel.
    pub fn for_host(&self, held: &HashSet<Capability>) -> Result<LinuxSeccomp> {
        // One that is not known is older than any.
        let kernel = kernel_version().unwrap_or_default();
        self.resolve(held, kernel, self.architectures())
    }

    /// This host's with the older kinds that go with it, or those that are
    /// listed: programs of a kind that is not are killed.
    fn architectures(&self) -> Vec<Arch> {
        let maps = self.arch_map.iter().flatten();
        let mapped = maps.filter(|map| map.architecture == HOST_ARCHES[0].0);
        let older = mapped.flat_map(|map| map.sub_architectures.iter().flatten());
        let older: Vec<&String> = older.collect();
        let listed = self.architectures.iter().flatten();
        let listed: Vec<&Arch> = listed.collect();
        let has = |(name, arch): &&(&str, Arch)| {
            *arch == ARCH.1 || listed.contains(&arch) || older.iter().any(|older| older == name)
        };
        HOST_ARCHES
            .iter()
            .filter(has)
            .map(|(_, arch)| *arch)
            .collect()
    }

    fn resolve(
        &self,
        held: &HashSet<Capability>,
        kernel: (u32, u32),
        architectures: Vec<Arch>,
    ) -> Result<LinuxSeccomp> {
        let rules = self.syscalls.iter().flatten();
        let syscalls = rules
            .filter(|rule| rule.applies(held, kernel))
            .map(Rule::to_oci)
            .collect::<Result<Vec<_>>>()?;
        let mut seccomp = LinuxSeccompBuilder::default()
            .default_action(self.default_action)
            .architectures(architectures)
            .syscalls(syscalls)
            .build()?;
        seccomp.set_default_errno_ret(self.default_errno_ret);
        seccomp.set_flags(self.flags.clone());
        Ok(seccomp)
    }
}

impl Rule {
    fn applies(&self, held: &HashSet<Capability>, kernel: (u32, u32)) -> bool {
        let included = self
            .includes
            .as_ref()
            .is_none_or(|condition| condition.all_met(held, kernel));
        let excluded = self
            .excludes
            .as_ref()
            .is_some_and(|condition| condition.any_met(held, kernel));
        included && !excluded
    }

    fn to_oci(&self) -> Result<LinuxSyscall> {
        let mut rule = LinuxSyscallBuilder::default()
            .names(self.names.clone().unwrap_or_default())
            .action(self.action)
            .build()?;
        rule.set_errno_ret(self.errno_ret);
        rule.set_args(self.args.clone());
        Ok(rule)
    }
}

impl Condition {
    fn check(&self) -> std::result::Result<(), ProfileError> {
        match &self.min_kernel {
            Some(text) if version(text).is_none() => Err(ProfileError::Field {
                field: "minKernel",
                value: text.clone(),
                why: "is no version such as 5.10",
            }),
            _ => Ok(()),
        }
    }

    /// None without such a condition.
    fn has_kernel(&self, kernel: (u32, u32)) -> Option<bool> {
        let least = self.min_kernel.as_deref()?;
        Some(version(least).is_some_and(|least| least <= kernel))
    }

    /// As an inclusion: each capability, one of the architectures, the kernel.
    fn all_met(&self, held: &HashSet<Capability>, kernel: (u32, u32)) -> bool {
        let mut caps = self.caps.iter().flatten();
        let arches = self.arches.as_deref().unwrap_or_default();
        caps.all(|name| holds(held, name))
            && (arches.is_empty() || arches.iter().any(|arch| arch == ARCH.0))
            && self.has_kernel(kernel).unwrap_or(true)
    }

    /// As an exclusion: any of them.
    fn any_met(&self, held: &HashSet<Capability>, kernel: (u32, u32)) -> bool {
        let mut caps = self.caps.iter().flatten();
        let mut arches = self.arches.iter().flatten();
        caps.any(|name| holds(held, name))
            || arches.any(|arch| arch == ARCH.0)
            || self.has_kernel(kernel).unwrap_or(false)
    }
}

fn holds(held: &HashSet<Capability>, name: &str) -> bool {
    let capability = serde_json::from_value(serde_json::Value::String(name.to_owned()));
    // One that this Linux does not have is held by nobody.
    capability.is_ok_and(|capability: Capability| held.contains(&capability))
}

/// Of `5.10` or `5.10.1`, the first two numbers.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.').map(|part| part.parse().ok());
    let version = (parts.next()??, parts.next()??);
    parts.all(|part| part.is_some()).then_some(version)
}

/// Turns a name into its number; where both are given, the number counts.
fn name_errno(
    field: &'static str,
    name: &Option<String>,
    number: &mut Option<u32>,
) -> std::result::Result<(), ProfileError> {
    let name = name.as_deref().filter(|name| !name.is_empty());
    let Some(name) = name.filter(|_| number.is_none()) else {
        return Ok(());
    };
    let known = (1..=LAST_ERRNO).find(|&number| format!("{:?}", Errno::from_raw(number)) == name);
    match known.and_then(|number| u32::try_from(number).ok()) {
        Some(known) => {
            *number = Some(known);
            Ok(())
        }
        None => Err(ProfileError::Field {
            field,
            value: name.to_owned(),
            why: "is no error of Linux",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(profile: &serde_json::Value) -> std::result::Result<Profile, ProfileError> {
        Profile::parse(profile.to_string().as_bytes())
    }

    fn names(profile: &Profile, held: &[Capability]) -> Vec<String> {
        let oci = profile
            .for_container(&held.iter().copied().collect())
            .unwrap();
        let rules = oci.syscalls().clone().unwrap();
        rules.iter().flat_map(|rule| rule.names().clone()).collect()
    }

    #[test]
    fn rules_depend_on_capabilities_architecture_and_kernel() {
        let rule = |name: &str, includes: serde_json::Value, excludes: serde_json::Value| {
            json!({ "names": [name], "action": "SCMP_ACT_ALLOW",
                    "includes": includes, "excludes": excludes })
        };
        let profile = parse(&json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "archMap": [{ "architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"] }],
            "syscalls": [
                rule("always", json!({}), json!({})),
                rule("admin", json!({ "caps": ["CAP_SYS_ADMIN"] }), json!({})),
                rule("no-admin", json!({}), json!({ "caps": ["CAP_SYS_ADMIN"] })),
                rule("two", json!({ "caps": ["CAP_SYS_ADMIN", "CAP_BPF"] }), json!({})),
                rule("here", json!({ "arches": ["amd64", "x32"] }), json!({})),
                rule("elsewhere", json!({ "arches": ["s390x"] }), json!({})),
                rule("not-here", json!({}), json!({ "arches": ["amd64"] })),
                rule("old", json!({ "minKernel": "4.8" }), json!({})),
                rule("new", json!({ "minKernel": "99.0" }), json!({})),
                rule("unheard-of", json!({ "caps": ["CAP_FLY"] }), json!({})),
            ],
        }))
        .unwrap();
        let on_host = profile.for_host(&HashSet::new()).unwrap();
        assert_eq!(
            on_host.architectures().clone().unwrap(),
            [Arch::ScmpArchX86_64, Arch::ScmpArchX86]
        );
        assert_eq!(names(&profile, &[]), ["always", "no-admin", "here", "old"]);
        assert_eq!(
            names(&profile, &[Capability::SysAdmin]),
            ["always", "admin", "here", "old"]
        );
        let oci = profile.for_container(&HashSet::new()).unwrap();
        assert_eq!(oci.default_errno_ret(), Some(38));
    }

    #[test]
    fn arguments_and_errors_reach_the_guest() {
        let profile = parse(&json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                { "name": "clone", "action": "SCMP_ACT_ERRNO", "errno": "ENOSYS",
                  "args": [{ "index": 0, "value": 2_114_060_288_u64, "valueTwo": 0,
                             "op": "SCMP_CMP_MASKED_EQ" }] },
                { "names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errno": "ENOSYS",
                  "errnoRet": 1, "args": null, "comment": "" },
            ],
        }))
        .unwrap();
        let oci = serde_json::to_value(profile.for_container(&HashSet::new()).unwrap()).unwrap();
        assert_eq!(oci["syscalls"][0]["names"], json!(["clone"]));
        assert_eq!(oci["syscalls"][0]["errnoRet"], 38);
        assert_eq!(oci["syscalls"][0]["args"][0]["op"], "SCMP_CMP_MASKED_EQ");
        assert_eq!(oci["syscalls"][1]["errnoRet"], 1);
        assert_eq!(oci["flags"], json!(["SECCOMP_FILTER_FLAG_LOG"]));
    }

    #[test]
    fn what_cannot_be_kept_to_is_refused_in_words() {
        let allow = "SCMP_ACT_ALLOW";
        for (profile, why) in [
            (json!({ "defaultAction": "SCMP_ACT_NOTIFY" }), "listener"),
            (
                json!({ "defaultAction": allow, "listenerPath": "/x" }),
                "listener",
            ),
            (
                json!({ "defaultAction": allow, "architectures": ["SCMP_ARCH_X86"], "archMap": [] }),
                "both architectures and archMap",
            ),
            (
                json!({ "defaultAction": allow,
                        "syscalls": [{ "name": "a", "names": ["b"], "action": allow }] }),
                "both name and names",
            ),
            (
                json!({ "defaultAction": allow,
                        "syscalls": [{ "names": ["b"], "action": allow, "errno": "EWHAT" }] }),
                "\"EWHAT\" is no error",
            ),
            (
                json!({ "defaultAction": allow,
                        "syscalls": [{ "names": ["b"], "action": allow,
                                       "includes": { "minKernel": "new" } }] }),
                "minKernel \"new\"",
            ),
            (json!({ "defaultAction": "ALLOW" }), "no seccomp profile"),
            (json!({}), "no seccomp profile"),
        ] {
            let error = parse(&profile).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_file_is_read_up_to_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("profile.json");
        assert!(matches!(
            Profile::read(&path),
            Err(ProfileError::Read(error)) if error.kind() == io::ErrorKind::NotFound
        ));
        assert!(matches!(
            Profile::read(dir.path()),
            Err(ProfileError::NoFile)
        ));
        let text = r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#;
        std::fs::write(&path, text).unwrap();
        assert!(Profile::read(&path).is_ok());
        let room = usize::try_from(MAX_BYTES).unwrap();
        std::fs::write(&path, format!("{text}{}", " ".repeat(room))).unwrap();
        assert!(matches!(Profile::read(&path), Err(ProfileError::TooLarge)));
    }
}
