//! Pods on the host's kernel: those that need its network, IPC or process ids,
//! and those whose handler says so.
//!
//! Above, such a pod is as any other: the driver speaks to its supervisor
//! (`drupe-shim`) as to a VMM and an agent. What differs is here: the
//! supervisor's start ([`supervisor`]), a container's root ([`rootfs`]) and its
//! OCI spec ([`spec`]), which is the guest's with the host's things in place of
//! the guest's.

pub mod features;
pub mod rootfs;
pub mod spec;
pub mod supervisor;
mod sysctl;

mod devices;
mod propagation;

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

pub use sysctl::check as check_sysctls;

use crate::spec::{ContainerSpec, HostNamespaces, PodSpec};
use crate::{Error, Result};

/// Searched beside PATH, which services often have without the last two.
const PROGRAM_DIRS: [&str; 5] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
];

/// Linux takes no longer host name (`__NEW_UTS_LEN`).
const MAX_HOSTNAME: usize = 64;

pub(crate) const NAMESPACE_OPTIONS: &str = "config.linux.security_context.namespace_options";

/// Fails if a container is to be in a namespace of the host's that its pod is
/// not in: it would silently be in the pod's.
pub(crate) fn check_namespaces(spec: &ContainerSpec, pod: HostNamespaces) -> Result<()> {
    let asked = spec.security.host_namespaces;
    for (wanted, has, name) in [
        (asked.network, pod.network, "network"),
        (asked.ipc, pod.ipc, "ipc"),
        (asked.pid, pod.pid, "pid"),
    ] {
        if wanted && !has {
            return Err(Error::Invalid {
                field: format!("{NAMESPACE_OPTIONS}.{name}"),
                why: "is NODE, which the pod's is not".to_owned(),
            });
        }
    }
    Ok(())
}

/// The program of this name or path; none if it is not there.
#[must_use]
pub fn find_program(program: &Path) -> Option<PathBuf> {
    let runs = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if program.components().count() > 1 {
        return Some(program.to_owned()).filter(runs);
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = env::split_paths(&path)
        .chain(PROGRAM_DIRS.map(PathBuf::from))
        .collect();
    dirs.iter().map(|dir| dir.join(program)).find(runs)
}

/// The name that the pod's containers see: in the host's network the host's,
/// since its name belongs to its addresses.
#[must_use]
pub fn hostname(spec: &PodSpec) -> String {
    if !spec.host_namespaces.network {
        return spec.hostname.clone();
    }
    let name = nix::unistd::gethostname().unwrap_or_default();
    let name = name.to_string_lossy().into_owned();
    if (1..=MAX_HOSTNAME).contains(&name.len()) {
        name
    } else {
        spec.hostname.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_by_name_or_path() {
        let found = find_program(Path::new("sh")).unwrap();
        assert!(found.is_absolute(), "{found:?}");
        assert_eq!(find_program(&found), Some(found.clone()));
        for missing in ["no-such-runtime", "/no/such", "/etc/passwd"] {
            assert_eq!(find_program(Path::new(missing)), None, "{missing}");
        }
    }
}
