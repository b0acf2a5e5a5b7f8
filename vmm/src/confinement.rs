//! What becomes of a pod where the node lacks a part of its confinement. The
//! daemon says it ([`Confinement`]); whoever finds that a part is lacking asks
//! here.
//!
//! | part | where |
//! | --- | --- |
//! | filters of system calls | [`crate::filter`] |
//! | Landlock | [`crate::jail`] |
//! | the rule for devices of cgroup v2 | [`crate::jail::refuse_devices`] |
//! | a user namespace for a `uml` guest's kernel | [`crate::jail::user_ns`] |
//! | a core for itself, if the pod is to have one | [`crate::core_scheduling`] |

use vmm_client::Confinement;

/// A part that the node lacks, and that the pod is not to be without.
#[derive(Debug, thiserror::Error)]
#[error("{part}: `confinement: required` starts no pod with less than all")]
pub struct Lacking {
    part: String,
}

/// Goes on without a part where that may be, and says so in the pod's log.
/// `lacks` is a clause that says which.
pub fn go_without(wanted: Confinement, lacks: impl Into<String>) -> Result<(), Lacking> {
    let part = lacks.into();
    if wanted.is_required() {
        return Err(Lacking { part });
    }
    tracing::warn!("{part}: the pod runs without it");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_goes_without_a_part_unless_all_is_required() {
        let lacks = "the node's kernel has no walls";
        go_without(Confinement::BestEffort, lacks).unwrap();
        let refused = go_without(Confinement::Required, lacks).unwrap_err();
        let words = refused.to_string();
        assert!(
            words.contains(lacks) && words.contains("`confinement: required`"),
            "{words}"
        );
    }
}
