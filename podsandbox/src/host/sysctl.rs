//! Which kernel parameters a pod on the host's kernel may set: those of the
//! namespaces that it has of its own.

use crate::spec::PodSpec;
use crate::{Error, Result};

/// Parameters of an IPC namespace that no prefix covers.
const IPC: [&str; 6] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
];
const IPC_PREFIXES: [&str; 2] = ["kernel.shm", "fs.mqueue."];

/// Fails for the first that would be the host's.
pub fn check(spec: &PodSpec) -> Result<()> {
    let host = spec.host_namespaces;
    for name in spec.sysctls.keys() {
        // A name may be written with slashes as well.
        let dotted = name.replace('/', ".");
        let of_ipc = IPC.contains(&dotted.as_str())
            || IPC_PREFIXES.iter().any(|prefix| dotted.starts_with(prefix));
        let why = if dotted.starts_with("net.") {
            host.network
                .then_some("belongs to the host's network, which the pod is in")
        } else if of_ipc {
            host.ipc
                .then_some("belongs to the host's IPC namespace, which the pod is in")
        } else {
            Some("belongs to no namespace: it would be set for the whole host")
        };
        if let Some(why) = why {
            return Err(Error::Invalid {
                field: format!("config.linux.sysctls[{name}]"),
                why: why.to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::HostNamespaces;

    fn refused(name: &str, host: HostNamespaces) -> bool {
        let spec = PodSpec {
            sysctls: [(name.to_owned(), "1".to_owned())].into(),
            host_namespaces: host,
            ..crate::spec::tests::pod()
        };
        check(&spec).is_err()
    }

    #[test]
    fn only_what_is_the_pods_own_can_be_set() {
        let own = HostNamespaces::default();
        let network = HostNamespaces {
            network: true,
            ..own
        };
        let ipc = HostNamespaces { ipc: true, ..own };
        assert!(!refused("net.ipv4.ip_forward", own));
        assert!(!refused("net/ipv4/ip_forward", ipc));
        assert!(refused("net.ipv4.ip_forward", network));
        assert!(!refused("kernel.shm_rmid_forced", network));
        assert!(refused("kernel.shm_rmid_forced", ipc));
        assert!(refused("fs.mqueue.msg_max", ipc));
        assert!(refused("vm.swappiness", own));
        assert!(refused("kernel.hostname", own));
    }
}
