//! Which pods, containers and images a list shows. Pure.

use std::collections::{BTreeMap, HashMap};

use cri_api::v1;
use podsandbox::PodSnapshot;
use podsandbox::record::ContainerRecord;

/// Every label asked for is there with that value.
pub fn labels_match(labels: &BTreeMap<String, String>, wanted: &HashMap<String, String>) -> bool {
    wanted
        .iter()
        .all(|(name, value)| labels.get(name) == Some(value))
}

pub fn pod_matches(pod: &PodSnapshot, filter: &v1::PodSandboxFilter) -> bool {
    pod.pod.id.starts_with(&filter.id)
        && filter
            .state
            .as_ref()
            .is_none_or(|state| state.state() == super::pod::state(pod))
        && labels_match(&pod.pod.spec.labels, &filter.label_selector)
}

pub fn container_matches(container: &ContainerRecord, filter: &v1::ContainerFilter) -> bool {
    container.id.starts_with(&filter.id)
        && container.pod_id.starts_with(&filter.pod_sandbox_id)
        && filter
            .state
            .as_ref()
            .is_none_or(|state| state.state() == super::container::state(container))
        && labels_match(&container.spec.labels, &filter.label_selector)
}

pub fn container_stats_match(
    container: &ContainerRecord,
    filter: &v1::ContainerStatsFilter,
) -> bool {
    container.id.starts_with(&filter.id)
        && container.pod_id.starts_with(&filter.pod_sandbox_id)
        && labels_match(&container.spec.labels, &filter.label_selector)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn label_map() -> impl Strategy<Value = HashMap<String, String>> {
        proptest::collection::hash_map("[ab]{1,2}", "[01]", 0..4)
    }

    proptest! {
        #[test]
        fn a_selector_picks_exactly_the_supersets(labels in label_map(), wanted in label_map()) {
            let have: BTreeMap<_, _> = labels.clone().into_iter().collect();
            let is_superset = wanted.iter().all(|pair| labels.iter().any(|own| own == pair));
            prop_assert_eq!(labels_match(&have, &wanted), is_superset);
        }
    }

    #[test]
    fn no_selector_picks_everything() {
        assert!(labels_match(&BTreeMap::new(), &HashMap::new()));
    }
}
