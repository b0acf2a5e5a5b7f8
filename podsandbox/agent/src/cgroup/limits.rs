//! OCI resources (runtime spec 1.2, "Control groups") as cgroup v2 files.

use oci_spec::runtime::LinuxResources;

use super::CgroupError;

/// How files of limits begin that a kernel without swap does not have.
const SWAP: [&str; 2] = ["memory.swap.", "memory.zswap."];

/// The kernel's bounds of `cpu.weight`.
const WEIGHT: std::ops::RangeInclusive<u64> = 1..=10_000;

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) file: String,
    pub(super) value: String,
    /// The kernel may have no such file; then there is nothing to limit.
    pub(super) optional: bool,
}

/// The cgroup v2 files that OCI resources come to, in the order to write them.
pub(super) fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, CgroupError> {
    let mut settings = Vec::new();
    let mut set = |file: &str, value: String, optional| {
        settings.push(Setting {
            file: file.to_owned(),
            value,
            optional,
        });
    };
    let limit = |value: i64| {
        if value < 0 {
            "max".to_owned()
        } else {
            value.to_string()
        }
    };
    if let Some(memory) = resources.memory() {
        if let Some(bytes) = memory.limit().filter(|&bytes| bytes != 0) {
            set("memory.max", limit(bytes), false);
            // No swap beyond the limit; a guest without swap has no file.
            set(
                "memory.swap.max",
                if bytes < 0 { "max" } else { "0" }.to_owned(),
                true,
            );
        }
        if let Some(bytes) = memory.reservation().filter(|&bytes| bytes != 0) {
            set(
                "memory.low",
                if bytes < 0 {
                    "0".to_owned()
                } else {
                    bytes.to_string()
                },
                false,
            );
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
            set("cpu.weight", weight(shares).to_string(), false);
        }
        if let Some(idle) = cpu.idle() {
            set("cpu.idle", idle.to_string(), true);
        }
        // The kernel's default period when only a quota is given.
        let period = cpu.period().filter(|&period| period != 0);
        match (cpu.quota().filter(|&quota| quota != 0), period) {
            (None, None) => {}
            (quota, period) => {
                let quota = quota.filter(|&quota| quota > 0);
                let quota = quota.map_or("max".to_owned(), |quota| quota.to_string());
                set(
                    "cpu.max",
                    format!("{quota} {}", period.unwrap_or(100_000)),
                    false,
                );
            }
        }
        for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                set(file, value.clone(), true);
            }
        }
    }
    if let Some(pids) = resources.pids().as_ref() {
        let value = pids.limit();
        if value != 0 {
            set("pids.max", limit(value), false);
        }
    }
    for page in resources.hugepage_limits().iter().flatten() {
        let size = page.page_size();
        check_name(size)?;
        let value = page.limit();
        // A kernel without them keeps to a limit of none.
        set(
            &format!("hugetlb.{size}.max"),
            value.to_string(),
            value == 0,
        );
    }
    for (file, value) in resources.unified().iter().flatten() {
        check_name(file)?;
        // The kubelet limits swap for every container. A guest without any
        // keeps to whatever the limit is.
        let optional = SWAP.iter().any(|prefix| file.starts_with(prefix));
        set(file, value.clone(), optional);
    }
    Ok(settings)
}

/// Whether the kernel is to end all of a new container that is out of memory,
/// and not one process of it.
///
/// Of a client that says something in cgroup v2's own words (`unified`) it is
/// what these say, and without a word about it the kernel's default, one
/// process: so the kubelet means it, which names `memory.oom.group` unless its
/// `singleProcessOOMKill` is set, and then only the limit of swap; and so it is
/// with containerd. All others get what the kubelet asks for by default.
pub(super) fn ends_as_a_whole(resources: Option<&LinuxResources>) -> bool {
    let unified = resources.and_then(|resources| resources.unified().as_ref());
    unified.is_none_or(|files| files.is_empty())
}

/// A file of the cgroup's own directory that holds a limit: `cgroup.*` moves
/// and kills processes and is the agent's.
fn check_name(file: &str) -> Result<(), CgroupError> {
    let fine = !file.is_empty()
        && file.len() < 128
        && !file.starts_with("cgroup.")
        && file
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'_')
        && !file.starts_with('.');
    if fine {
        Ok(())
    } else {
        Err(CgroupError::Name {
            file: file.to_owned(),
        })
    }
}

/// `cpu.weight` for OCI's cpu shares: the conversion that the field's runtimes
/// agreed on, which maps 2 to 1, 1024 to 100 and 262144 to 10000.
#[expect(clippy::disallowed_methods, reason = "the bounds are constants")]
fn weight(shares: u64) -> u64 {
    if shares <= 2 {
        return *WEIGHT.start();
    }
    if shares >= 262_144 {
        return *WEIGHT.end();
    }
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    (10f64.powf(exponent).ceil() as u64).clamp(*WEIGHT.start(), *WEIGHT.end())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(json: &str) -> Vec<(String, String)> {
        settings(&serde_json::from_str(json).unwrap())
            .unwrap()
            .into_iter()
            .map(|setting| (setting.file, setting.value))
            .collect()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|&(a, b)| (a.to_owned(), b.to_owned()))
            .collect()
    }

    #[test]
    fn limits_become_files() {
        assert_eq!(
            written(
                r#"{"memory":{"limit":1048576},"cpu":{"shares":1024,"quota":50000,"period":100000},
                    "pids":{"limit":100}}"#
            ),
            pairs(&[
                ("memory.max", "1048576"),
                ("memory.swap.max", "0"),
                ("cpu.weight", "100"),
                ("cpu.max", "50000 100000"),
                ("pids.max", "100"),
            ])
        );
        assert_eq!(
            written(r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#),
            pairs(&[
                ("memory.max", "max"),
                ("memory.swap.max", "max"),
                ("cpu.max", "max 100000")
            ])
        );
        assert!(written("{}").is_empty());
    }

    #[test]
    fn unified_names_stay_in_the_directory() {
        assert_eq!(
            written(r#"{"unified":{"memory.high":"5"}}"#),
            pairs(&[("memory.high", "5")])
        );
        for bad in ["../x", "cgroup.kill", "a/b", ""] {
            let resources: LinuxResources =
                serde_json::from_value(serde_json::json!({ "unified": { bad: "1" } })).unwrap();
            assert!(
                matches!(settings(&resources), Err(CgroupError::Name { .. })),
                "{bad}"
            );
        }
    }

    /// What the kubelet sends for every container, by its configuration.
    const GROUP: &str = r#"{"unified":{"memory.oom.group":"1","memory.swap.max":"0"}}"#;
    const SINGLE_PROCESS: &str = r#"{"unified":{"memory.swap.max":"0"}}"#;

    #[test]
    fn limits_of_swap_need_no_swap() {
        let settings = settings(&serde_json::from_str(GROUP).unwrap()).unwrap();
        let optional = |file: &str| settings.iter().find(|s| s.file == file).unwrap().optional;
        assert!(optional("memory.swap.max") && !optional("memory.oom.group"));
    }

    #[test]
    fn a_client_that_says_nothing_has_its_containers_ended_whole() {
        let whole = |json: &str| ends_as_a_whole(Some(&serde_json::from_str(json).unwrap()));
        assert!(ends_as_a_whole(None) && whole("{}") && whole(r#"{"unified":{}}"#));
        // Its file is among those that are written.
        assert!(!whole(GROUP) && written(GROUP).contains(&("memory.oom.group".into(), "1".into())));
        assert!(!whole(SINGLE_PROCESS));
    }

    #[test]
    fn the_known_points_of_the_weight_curve() {
        assert_eq!([2, 1024, 262_144].map(weight), [1, 100, 10_000]);
    }

    proptest! {
        #[test]
        fn weights_grow_with_shares(a in 2u64..400_000, b in 2u64..400_000) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(weight(low) <= weight(high));
            prop_assert!(WEIGHT.contains(&weight(a)));
        }
    }
}
