//! How much of a pod's confinement there has to be.

use std::fs;

use landlock::ABI;
use serde::{Deserialize, Serialize};

/// What of Landlock a pod's processes restrict themselves by, where the node's
/// kernel has it: that of Linux 6.12. Each later one has rights that would have
/// to be thought about first.
pub const LANDLOCK_ASKED: ABI = ABI::V6;

/// What becomes of a pod where the node lacks a part of its confinement, such as
/// filters of system calls or Landlock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confinement {
    /// It runs, kept by what there is.
    #[default]
    BestEffort,
    /// It is refused.
    Required,
}

impl Confinement {
    /// Whether nothing may be lacking.
    #[must_use]
    pub fn is_required(self) -> bool {
        self == Self::Required
    }
}

/// Whether several hyperthreads of a CPU core are in use on this node; so it is
/// taken to be where its kernel does not tell.
#[must_use]
pub fn has_hyperthreads() -> bool {
    let active = fs::read_to_string("/sys/devices/system/cpu/smt/active");
    active.map_or(true, |text| text.trim() != "0")
}
