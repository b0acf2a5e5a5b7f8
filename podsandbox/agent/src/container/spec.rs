//! An OCI runtime spec (1.2) as the parts of a [`Plan`](super::plan::Plan).

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::{GUEST_PIDS, PID_OF};
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespaceType, Mount, PosixRlimitType,
    Process, Spec,
};

use super::capabilities::capabilities;
use super::dev_tree::{self, DevError};
use super::mounts::{self, MountError};
use super::node_devices::Devices;
use super::plan::{Identity, Program, Rlimit, RootSetup, SeccompFilter, StringArray};
use super::user::Resolved;
use super::{device_files, guest_devices};
use crate::rootfs::Trees;
use crate::userns::IdRange;

/// What a PATH-less environment searches, as execvp(3) of every distribution.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// `MAX_ARG_STRLEN` and friends bound each string; this bounds their number.
const MAX_STRINGS: usize = 65536;

#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("the OCI spec is not valid")]
    Json(#[from] serde_json::Error),
    #[error("the OCI spec has no {field}")]
    Missing { field: &'static str },
    #[error("{field} contains a null byte")]
    Null { field: &'static str },
    #[error("{field} has {count} entries, more than {max}")]
    TooMany {
        field: &'static str,
        count: usize,
        max: usize,
    },
    #[error("{field} {value:?} is not an absolute path")]
    NotAbsolute { field: &'static str, value: String },
    #[error("device {path:?} is neither a character nor a block device nor a FIFO")]
    Device { path: String },
    #[error("cannot look for the guest's devices in {path}")]
    GuestDevices { path: PathBuf, source: io::Error },
    #[error("kernel parameter {name:?} is not a name with dots")]
    Sysctl { name: String },
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Dev(#[from] DevError),
}

/// A parsed spec that has what every container needs.
#[derive(Debug)]
pub struct ContainerSpec {
    spec: Spec,
    process: Process,
}

/// Which namespaces a container has of its own, beside its mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnNamespaces {
    pub pid: Pids,
    pub cgroup: bool,
}

/// Whose processes a container sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pids {
    Own,
    /// Those of the container with this id.
    Of(String),
    /// Those of all of the pod's containers that share theirs.
    Shared,
    /// All of the guest's, the agent among them.
    Guest,
}

impl ContainerSpec {
    pub fn parse(json: &[u8]) -> Result<Self, SpecError> {
        let mut spec: Spec = serde_json::from_slice(json)?;
        let process = spec
            .process()
            .clone()
            .ok_or(SpecError::Missing { field: "process" })?;
        spec.set_process(None);
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(SpecError::Missing {
                field: "process.args",
            });
        }
        Ok(Self { spec, process })
    }

    pub fn args(&self) -> &[String] {
        self.process.args().as_deref().unwrap_or_default()
    }

    /// Rows and columns of the terminal, when there is to be one.
    pub fn terminal(&self) -> Option<(u16, u16)> {
        self.process.terminal().unwrap_or(false).then(|| {
            let cut = |size: u64| u16::try_from(size).unwrap_or(u16::MAX);
            self.process
                .console_size()
                .map_or((0, 0), |size| (cut(size.height()), cut(size.width())))
        })
    }

    pub fn namespaces(&self) -> OwnNamespaces {
        let listed = self
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref());
        let find = |kind| listed.and_then(|all| all.iter().find(|ns| ns.typ() == kind));
        OwnNamespaces {
            pid: find(LinuxNamespaceType::Pid).map_or(Pids::Shared, |pid| {
                let path = pid.path().as_deref().and_then(Path::to_str);
                match (path, path.and_then(|path| path.strip_prefix(PID_OF))) {
                    (_, Some(target)) => Pids::Of(target.to_owned()),
                    (Some(GUEST_PIDS), None) => Pids::Guest,
                    _ => Pids::Own,
                }
            }),
            cgroup: find(LinuxNamespaceType::Cgroup).is_some(),
        }
    }

    pub fn resources(&self) -> Option<&oci_spec::runtime::LinuxResources> {
        self.spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref())
    }

    /// Whether the container may make cgroups below its own.
    pub fn has_writable_cgroup(&self) -> bool {
        let is_writable = |mount: &Mount| {
            let has = |word: &str| mount.options().iter().flatten().any(|o| o == word);
            matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2")) && !has("ro")
        };
        self.spec.mounts().iter().flatten().any(is_writable)
    }

    pub fn seccomp(&self) -> Option<&oci_spec::runtime::LinuxSeccomp> {
        self.spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.seccomp().as_ref())
    }

    /// Rules about devices, and device files, that the spec asks for.
    pub fn devices(&self) -> (&[LinuxDeviceCgroup], &[LinuxDevice]) {
        let rules = self
            .resources()
            .and_then(|resources| resources.devices().as_deref());
        let files = self
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.devices().as_deref());
        (rules.unwrap_or_default(), files.unwrap_or_default())
    }

    /// Whether a rule allows whatever device there is: the container is
    /// privileged.
    fn may_use_every_device(&self) -> bool {
        let (rules, _) = self.devices();
        rules.iter().any(|rule| {
            let has = |letter| rule.access().as_deref().unwrap_or("rwm").contains(letter);
            let is_any = |number: Option<i64>| number.is_none_or(|number| number == -1);
            rule.allow()
                && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
                && is_any(rule.major())
                && is_any(rule.minor())
                && ['r', 'w', 'm'].into_iter().all(has)
        })
    }

    /// Adds device files and rules; a file takes the place of another one of
    /// its path.
    pub fn add_devices(&mut self, (more, allowed): Devices) {
        let mut linux = self.spec.linux().clone().unwrap_or_default();
        let mut files = linux.devices().clone().unwrap_or_default();
        files.retain(|file| more.iter().all(|device| device.path() != file.path()));
        files.extend(more);
        linux.set_devices(Some(files));
        let mut resources = linux.resources().clone().unwrap_or_default();
        let mut rules = resources.devices().clone().unwrap_or_default();
        rules.extend(allowed);
        resources.set_devices(Some(rules));
        linux.set_resources(Some(resources));
        self.spec.set_linux(Some(linux));
    }

    /// Sources of its bind mounts, and whether what it mounts in one of them is
    /// for others to see.
    pub fn volumes(&self) -> (impl Iterator<Item = PathBuf>, bool) {
        let mounts = self.spec.mounts().as_deref().unwrap_or_default();
        let binds = mounts.iter().filter(|mount| mounts::is_bind(mount));
        let sources = binds.filter_map(|mount| mount.source().clone());
        (sources, mounts.iter().any(mounts::propagates))
    }

    /// The user of the spec, for requests that name none.
    pub fn default_uid(&self) -> (u32, u32, &[u32]) {
        let user = self.process.user();
        (
            user.uid(),
            user.gid(),
            user.additional_gids().as_deref().unwrap_or_default(),
        )
    }

    /// The process's environment, with the HOME of its user where it has none.
    pub fn environment(&self, user: &Resolved) -> Result<StringArray, SpecError> {
        let env = self.process.env().as_deref().unwrap_or_default();
        let mut strings = c_strings("process.env", env)?;
        if !env.iter().any(|entry| entry.starts_with("HOME=")) {
            let home = user.home.as_deref().unwrap_or("/");
            strings.push(c_string("HOME", &format!("HOME={home}"))?);
        }
        Ok(StringArray::new(strings))
    }

    pub fn identity(
        &self,
        user: &Resolved,
        seccomp: Option<Arc<SeccompFilter>>,
    ) -> Result<Identity, SpecError> {
        let process = &self.process;
        let cwd = process.cwd().to_string_lossy();
        let cwd = if cwd.is_empty() { "/" } else { &*cwd };
        if !cwd.starts_with('/') {
            return Err(SpecError::NotAbsolute {
                field: "process.cwd",
                value: cwd.to_owned(),
            });
        }
        let score = process.oom_score_adj().map(|score| score.to_string());
        Ok(Identity {
            uid: user.uid,
            gid: user.gid,
            groups: user.groups.clone(),
            capabilities: capabilities(process.capabilities().as_ref(), user.uid),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            seccomp,
            rlimits: rlimits(process),
            oom_score_adj: score
                .map(|score| c_string("oom_score_adj", &score))
                .transpose()?,
            cwd: c_string("process.cwd", cwd)?,
            umask: process.user().umask(),
        })
    }

    /// How the container's root is set up, with `ids` in a user namespace.
    pub fn root_setup(
        &self,
        trees: Trees,
        shared_dir: &Path,
        etc_files: bool,
        ids: Option<IdRange>,
    ) -> Result<RootSetup, SpecError> {
        let mounts = self.spec.mounts().as_deref().unwrap_or_default();
        let mut mounts = mounts::prepare(mounts, shared_dir, etc_files, trees.images)?;
        let linux = self.spec.linux().as_ref();
        let (_, asked) = self.devices();
        let masked = linux
            .and_then(|linux| linux.masked_paths().as_deref())
            .unwrap_or_default();
        let readonly = linux.and_then(|linux| linux.readonly_paths().as_deref());
        let mut sysctls = Vec::new();
        for (name, value) in linux
            .and_then(|linux| linux.sysctl().as_ref())
            .into_iter()
            .flatten()
        {
            let path = sysctl_path(name).ok_or_else(|| SpecError::Sysctl { name: name.clone() })?;
            sysctls.push((
                c_string("linux.sysctl", &path)?,
                c_string("linux.sysctl", value)?,
            ));
        }
        let root = self.spec.root().as_ref();
        let guest = match self.may_use_every_device() && mounts.make_devices {
            true => guest_devices::nodes(ids.is_some())?,
            false => Vec::new(),
        };
        let mut devices = device_files::nodes(asked, guest, mounts.make_devices)?;
        if let Some(ids) = ids {
            dev_tree::replace(&mut mounts.steps, &mut devices, ids)?;
        }
        Ok(RootSetup {
            tree: trees.root,
            cgroup_namespace: self.namespaces().cgroup,
            devices,
            symlinks: if mounts.make_devices {
                device_files::symlinks()
            } else {
                Vec::new()
            },
            mounts: mounts.steps,
            sysctls,
            masked: c_strings("linux.maskedPaths", masked)?,
            readonly: c_strings("linux.readonlyPaths", readonly.unwrap_or_default())?,
            readonly_root: root.and_then(|root| root.readonly()).unwrap_or(false),
        })
    }
}

pub(super) fn c_string(field: &'static str, value: &str) -> Result<CString, SpecError> {
    CString::new(value).map_err(|_| SpecError::Null { field })
}

fn c_strings(field: &'static str, values: &[String]) -> Result<Vec<CString>, SpecError> {
    if values.len() > MAX_STRINGS {
        return Err(SpecError::TooMany {
            field,
            count: values.len(),
            max: MAX_STRINGS,
        });
    }
    values.iter().map(|value| c_string(field, value)).collect()
}

/// What to run for `argv`, looked up in the PATH of `envp` as execvp(3) does.
pub fn program(argv: &[String], envp: Arc<StringArray>) -> Result<Program, SpecError> {
    let name = argv
        .first()
        .ok_or(SpecError::Missing { field: "command" })?;
    let argv = StringArray::new(c_strings("command", argv)?);
    let candidates = if name.contains('/') {
        vec![c_string("command", name)?]
    } else {
        let path = envp
            .strings()
            .iter()
            .find_map(|entry| entry.to_str().ok()?.strip_prefix("PATH="))
            .unwrap_or(DEFAULT_PATH);
        path.split(':')
            .filter(|_| !name.is_empty())
            .map(|dir| if dir.is_empty() { "." } else { dir })
            .map(|dir| c_string("command", &format!("{dir}/{name}")))
            .collect::<Result<_, _>>()?
    };
    Ok(Program {
        candidates,
        argv,
        envp,
    })
}

/// The path below /proc/sys of a kernel parameter written with dots. A name
/// whose first separator is a slash is taken as a path (sysctl(8)).
pub fn sysctl_path(name: &str) -> Option<String> {
    let separator = name.find(['.', '/']).map(|at| name.as_bytes()[at]);
    let path = if separator == Some(b'/') {
        name.to_owned()
    } else {
        name.replace('.', "/")
    };
    let fine = path.split('/').all(|part| !part.is_empty() && part != "..") && !path.contains('\0');
    fine.then(|| format!("/proc/sys/{path}"))
}

/// The spec's limits, and ours where it has none. The agent's own of open files
/// is not for containers: programs close every descriptor up to it one by one.
/// The kernel's own of a user's processes is half of what fits into the guest's
/// memory; what bounds a container is its cgroup.
fn rlimits(process: &Process) -> Vec<Rlimit> {
    const DEFAULTS: [Rlimit; 2] = [
        Rlimit {
            resource: libc::RLIMIT_NOFILE,
            soft: 1024,
            hard: 1_048_576,
        },
        Rlimit {
            resource: libc::RLIMIT_NPROC,
            soft: libc::RLIM_INFINITY,
            hard: libc::RLIM_INFINITY,
        },
    ];
    let asked = process.rlimits().iter().flatten().map(|limit| Rlimit {
        resource: resource(limit.typ()),
        soft: limit.soft(),
        hard: limit.hard(),
    });
    let mut limits: Vec<Rlimit> = asked.collect();
    for default in DEFAULTS {
        if !limits
            .iter()
            .any(|limit| limit.resource == default.resource)
        {
            limits.push(default);
        }
    }
    limits
}

fn resource(kind: PosixRlimitType) -> u32 {
    use PosixRlimitType as R;
    match kind {
        R::RlimitCpu => libc::RLIMIT_CPU,
        R::RlimitFsize => libc::RLIMIT_FSIZE,
        R::RlimitData => libc::RLIMIT_DATA,
        R::RlimitStack => libc::RLIMIT_STACK,
        R::RlimitCore => libc::RLIMIT_CORE,
        R::RlimitRss => libc::RLIMIT_RSS,
        R::RlimitNproc => libc::RLIMIT_NPROC,
        R::RlimitNofile => libc::RLIMIT_NOFILE,
        R::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        R::RlimitAs => libc::RLIMIT_AS,
        R::RlimitLocks => libc::RLIMIT_LOCKS,
        R::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        R::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        R::RlimitNice => libc::RLIMIT_NICE,
        R::RlimitRtprio => libc::RLIMIT_RTPRIO,
        R::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envp(entries: &[&str]) -> Arc<StringArray> {
        Arc::new(StringArray::new(
            entries.iter().map(|&e| CString::new(e).unwrap()).collect(),
        ))
    }

    fn candidates(name: &str, env: &[&str]) -> Vec<String> {
        program(&[name.to_owned()], envp(env))
            .unwrap()
            .candidates
            .iter()
            .map(|path| path.to_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn a_name_is_searched_in_the_containers_path() {
        assert_eq!(
            candidates("ls", &["A=b", "PATH=/x::/y"]),
            ["/x/ls", "./ls", "/y/ls"]
        );
        assert_eq!(candidates("ls", &[])[0], "/usr/local/sbin/ls");
        assert_eq!(candidates("./ls", &["PATH=/x"]), ["./ls"]);
        assert!(candidates("", &["PATH=/x"]).is_empty());
    }

    #[test]
    fn kernel_parameters_stay_below_proc_sys() {
        assert_eq!(
            sysctl_path("net.ipv4.ip_forward").as_deref(),
            Some("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            sysctl_path("net/ipv4/conf/eth0.1/arp_filter").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/arp_filter")
        );
        for bad in ["", "..", "net/../../../etc/passwd", "/abs", "a..b"] {
            assert_eq!(sysctl_path(bad), None, "{bad}");
        }
    }

    #[test]
    fn limits_of_the_spec_replace_ours() {
        let process: Process = serde_json::from_str(
            r#"{"cwd":"/","user":{"uid":0,"gid":0},
                "rlimits":[{"type":"RLIMIT_NPROC","soft":5,"hard":6}]}"#,
        )
        .unwrap();
        let limits = rlimits(&process);
        let of = |resource| limits.iter().find(|limit| limit.resource == resource);
        assert_eq!(of(libc::RLIMIT_NPROC).unwrap().hard, 6);
        assert_eq!(of(libc::RLIMIT_NOFILE).unwrap().soft, 1024);
        assert_eq!(limits.len(), 2);
    }

    #[test]
    fn the_guests_processes_are_seen_only_by_name() {
        let pids = |namespaces: &str| {
            let spec = format!(
                r#"{{"ociVersion":"1.2.0","process":{{"cwd":"/","args":["a"],
                    "user":{{"uid":0,"gid":0}}}},"linux":{{"namespaces":{namespaces}}}}}"#
            );
            let spec = ContainerSpec::parse(spec.as_bytes()).unwrap();
            spec.namespaces().pid
        };
        assert_eq!(pids(r#"[{"type":"mount"}]"#), Pids::Shared);
        assert_eq!(pids(r#"[{"type":"pid"}]"#), Pids::Own);
        let named = r#"[{"type":"pid","path":"/proc/1/ns/pid"}]"#;
        assert_eq!(pids(named), Pids::Guest);
        let target = r#"[{"type":"pid","path":"container:c1"}]"#;
        assert_eq!(pids(target), Pids::Of("c1".to_owned()));
        let other = r#"[{"type":"pid","path":"/proc/2/ns/pid"}]"#;
        assert_eq!(pids(other), Pids::Own);
    }

    #[test]
    fn a_spec_without_a_command_is_refused() {
        let error = ContainerSpec::parse(
            br#"{"ociVersion":"1.2.0","process":{"cwd":"/","args":[],"user":{"uid":0,"gid":0}}}"#,
        )
        .unwrap_err();
        assert_eq!(error.to_string(), "the OCI spec has no process.args");
    }
}
