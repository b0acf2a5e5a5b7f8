//! What happens to pulls, told to whoever counts it.

use std::fmt::Debug;

use crate::error::ErrorKind;

/// Called from the tasks and threads that pull: it must not wait.
pub trait Observer: Debug + Send + Sync + 'static {
    /// A pull is over; several calls for one image share one.
    fn pull_ended(&self, outcome: PullOutcome);

    /// So many bytes of a layer, as registries have it, have come.
    fn layer_bytes(&self, count: u64);
}

/// Nobody counts.
impl Observer for () {
    fn pull_ended(&self, _: PullOutcome) {}
    fn layer_bytes(&self, _: u64) {}
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullOutcome {
    Pulled,
    /// The tag leads to the image that is here already.
    UpToDate,
    Failed(ErrorKind),
}
