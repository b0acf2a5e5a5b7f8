//! Uids for pods: each is the next one after that which was given last.
//!
//! What the kernel counts and keeps by uid (keyrings, quotas, processes that
//! are not quite gone) is thus not handed on from one pod to the next.

use std::collections::BTreeSet;

use crate::config::UIDS;

pub(super) struct Uids {
    /// First of [`UIDS`].
    base: u32,
    last: Option<u32>,
}

impl Uids {
    /// `last` was given last, by a daemon before this one, if it is of these.
    pub(super) fn new(base: u32, last: Option<u32>) -> Self {
        let is_ours = |last: &u32| last.checked_sub(base).is_some_and(|nth| nth < UIDS);
        Self {
            base,
            last: last.filter(is_ours),
        }
    }

    /// None if all are taken.
    pub(super) fn give(&mut self, taken: &BTreeSet<u32>) -> Option<u32> {
        let first = self.last.map_or(0, |last| last - self.base + 1);
        let round = (first..UIDS).chain(0..first);
        let mut all = round.map(|nth| self.base.saturating_add(nth));
        let given = all.find(|uid| !taken.contains(uid))?;
        self.last = Some(given);
        Some(given)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u32 = 1_879_048_192;

    #[test]
    fn a_uid_that_is_free_again_is_not_the_next() {
        let mut uids = Uids::new(BASE, None);
        let none = BTreeSet::new();
        assert_eq!(uids.give(&none), Some(BASE));
        // The first pod is gone.
        assert_eq!(uids.give(&none), Some(BASE + 1));
        let taken = BTreeSet::from([BASE + 1, BASE + 2, BASE + 3]);
        assert_eq!(uids.give(&taken), Some(BASE + 4));
        // Nor is it after a restart.
        let mut uids = Uids::new(BASE, Some(BASE + 4));
        assert_eq!(uids.give(&none), Some(BASE + 5));
    }

    #[test]
    fn they_go_round() {
        let mut uids = Uids::new(BASE, Some(BASE + UIDS - 1));
        assert_eq!(uids.give(&BTreeSet::from([BASE])), Some(BASE + 1));
        let all: BTreeSet<u32> = (BASE..BASE + UIDS).collect();
        assert_eq!(uids.give(&all), None);
        assert_eq!(uids.give(&BTreeSet::new()), Some(BASE + 2));
        // The only one left is the one that was given last.
        let mut but_one = all;
        but_one.remove(&(BASE + 2));
        assert_eq!(uids.give(&but_one), Some(BASE + 2));
    }

    #[test]
    fn a_uid_of_another_base_counts_for_nothing() {
        for last in [0, 7, BASE - 1, BASE + UIDS, u32::MAX] {
            let mut uids = Uids::new(BASE, Some(last));
            assert_eq!(uids.give(&BTreeSet::new()), Some(BASE), "{last}");
        }
    }
}
