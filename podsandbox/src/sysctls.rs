//! Kernel parameters of a pod's guest.

use std::collections::{BTreeMap, HashMap};

/// What containerd sets for a pod unless it says otherwise: ports below 1024
/// and ICMP sockets are for every user of it, since they are the pod's own.
const DEFAULT_SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// The pod's kernel parameters. A name may have slashes instead of dots
/// (sysctl(8)).
pub fn of_guest(asked: &BTreeMap<String, String>) -> HashMap<String, String> {
    let is_asked = |name: &str| asked.keys().any(|asked| asked.replace('/', ".") == name);
    let defaults = DEFAULT_SYSCTLS.into_iter();
    let defaults = defaults.filter(|(name, _)| !is_asked(name));
    let mut sysctls: HashMap<_, _> = asked.clone().into_iter().collect();
    sysctls.extend(defaults.map(|(name, value)| (name.to_owned(), value.to_owned())));
    sysctls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_wins_in_either_spelling() {
        let of = |name: &str| {
            let asked = BTreeMap::from([(name.to_owned(), "1024".to_owned())]);
            of_guest(&asked)
        };
        for name in [
            "net.ipv4.ip_unprivileged_port_start",
            "net/ipv4/ip_unprivileged_port_start",
        ] {
            let sysctls = of(name);
            assert_eq!(sysctls[name], "1024");
            assert_eq!(sysctls.len(), 2, "{sysctls:?}");
        }
        assert_eq!(of("kernel.x").len(), 3);
    }
}
