//! What an update changes of a container's or a pod's resources. Pure.

use std::collections::BTreeMap;

use oci_spec::runtime::LinuxResources;

use crate::Result;
use crate::oci;
use crate::spec::Resources;

/// What an update says of a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Limit {
    #[default]
    Keep,
    Lift,
    To(u64),
}

impl Limit {
    fn on(self, before: Option<u64>) -> Option<u64> {
        match self {
            Self::Keep => before,
            Self::Lift => None,
            Self::To(limit) => Some(limit),
        }
    }
}

/// An update of a container, in the units of [`Resources`]. As in CRI, and as
/// the kubelet's CPU manager relies on, what it does not name stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerChange {
    pub cpu_period_us: Option<u64>,
    pub cpu_quota_us: Limit,
    pub cpu_shares: Option<u64>,
    pub memory_limit_bytes: Limit,
    pub memory_swap_limit_bytes: Limit,
    pub oom_score_adj: Option<i32>,
    pub cpuset_cpus: Option<String>,
    pub cpuset_mems: Option<String>,
    pub unified: BTreeMap<String, String>,
    pub hugepage_limits: BTreeMap<String, u64>,
}

impl ContainerChange {
    /// `before` as this update leaves it.
    #[must_use]
    pub fn on(&self, before: &Resources) -> Resources {
        let mut after = before.clone();
        after.cpu_period_us = self.cpu_period_us.or(before.cpu_period_us);
        after.cpu_quota_us = self.cpu_quota_us.on(before.cpu_quota_us);
        after.cpu_shares = self.cpu_shares.or(before.cpu_shares);
        after.memory_limit_bytes = self.memory_limit_bytes.on(before.memory_limit_bytes);
        after.memory_swap_limit_bytes = self
            .memory_swap_limit_bytes
            .on(before.memory_swap_limit_bytes);
        after.oom_score_adj = self.oom_score_adj.unwrap_or(before.oom_score_adj);
        if let Some(cpus) = &self.cpuset_cpus {
            after.cpuset_cpus.clone_from(cpus);
        }
        if let Some(mems) = &self.cpuset_mems {
            after.cpuset_mems.clone_from(mems);
        }
        let unified = self.unified.iter().map(|(k, v)| (k.clone(), v.clone()));
        after.unified.extend(unified);
        let pages = self.hugepage_limits.iter().map(|(k, v)| (k.clone(), *v));
        after.hugepage_limits.extend(pages);
        after
    }
}

/// An update of a pod: what is given takes the place of all that was stated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodChange {
    /// Sum over the containers.
    pub resources: Option<Resources>,
    pub overhead: Option<Resources>,
}

/// Resources for a container that has others: a limit that is not there is
/// said to be none, so that one that was is lifted.
pub fn explicit(resources: &Resources) -> Result<LinuxResources> {
    const NONE: i64 = -1;
    let mut explicit = oci::linux_resources(resources)?;
    if resources.cpu_quota_us.is_none()
        && let Some(cpu) = explicit.cpu_mut()
    {
        cpu.set_quota(Some(NONE));
    }
    if resources.memory_limit_bytes.is_none()
        && let Some(memory) = explicit.memory_mut()
    {
        memory.set_limit(Some(NONE));
    }
    Ok(explicit)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limit() -> impl Strategy<Value = Limit> {
        prop_oneof![
            Just(Limit::Keep),
            Just(Limit::Lift),
            any::<u64>().prop_map(Limit::To)
        ]
    }

    prop_compose! {
        fn resources()(
            cpu_period_us in proptest::option::of(any::<u64>()),
            cpu_quota_us in proptest::option::of(any::<u64>()),
            memory_limit_bytes in proptest::option::of(any::<u64>()),
            oom_score_adj in -1000..1000,
            unified in proptest::collection::btree_map("[a-c]", "[0-9]", 0..3),
        ) -> Resources {
            Resources {
                cpu_period_us, cpu_quota_us, memory_limit_bytes, oom_score_adj, unified,
                ..Resources::default()
            }
        }
    }

    prop_compose! {
        fn change()(
            cpu_period_us in proptest::option::of(any::<u64>()),
            cpu_quota_us in limit(),
            memory_limit_bytes in limit(),
            oom_score_adj in proptest::option::of(-1000..1000),
            unified in proptest::collection::btree_map("[a-c]", "[0-9]", 0..3),
        ) -> ContainerChange {
            ContainerChange {
                cpu_period_us, cpu_quota_us, memory_limit_bytes, oom_score_adj, unified,
                ..ContainerChange::default()
            }
        }
    }

    proptest! {
        #[test]
        fn an_update_that_names_nothing_changes_nothing(before in resources()) {
            prop_assert_eq!(ContainerChange::default().on(&before), before);
        }

        #[test]
        fn an_update_made_twice_is_made_once(before in resources(), change in change()) {
            let once = change.on(&before);
            prop_assert_eq!(change.on(&once), once);
        }

        #[test]
        fn what_is_named_is_what_is_there(before in resources(), change in change()) {
            let after = change.on(&before);
            match change.memory_limit_bytes {
                Limit::Keep => prop_assert_eq!(after.memory_limit_bytes, before.memory_limit_bytes),
                Limit::Lift => prop_assert_eq!(after.memory_limit_bytes, None),
                Limit::To(limit) => prop_assert_eq!(after.memory_limit_bytes, Some(limit)),
            }
            for (file, value) in &before.unified {
                let value = change.unified.get(file).unwrap_or(value);
                prop_assert_eq!(after.unified.get(file), Some(value));
            }
        }
    }

    #[test]
    fn a_limit_that_is_not_there_is_lifted() {
        let none = explicit(&Resources::default()).unwrap();
        assert_eq!(none.cpu().as_ref().unwrap().quota(), Some(-1));
        assert_eq!(none.memory().as_ref().unwrap().limit(), Some(-1));
        let some = Resources {
            cpu_quota_us: Some(50_000),
            memory_limit_bytes: Some(1 << 20),
            ..Resources::default()
        };
        let some = explicit(&some).unwrap();
        assert_eq!(some.cpu().as_ref().unwrap().quota(), Some(50_000));
        assert_eq!(some.memory().as_ref().unwrap().limit(), Some(1 << 20));
    }
}
