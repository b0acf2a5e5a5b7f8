//! Between CRI's messages and the types of the crates below. Nothing here acts.

pub mod container;
pub mod devices;
pub mod error;
pub mod event;
pub mod filter;
pub mod metrics;
pub mod pod;
pub mod resources;
pub mod security;
pub mod signal;
pub mod stats;
pub mod userns;

use tonic::Status;

/// The status for a field that cannot be acted on.
pub fn invalid(field: &str, why: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {why}"))
}

pub fn required<T>(field: &str, value: Option<T>) -> Result<T, Status> {
    value.ok_or_else(|| invalid(field, "is missing"))
}

/// For what CRI can say and drupe does not do yet: refused, never ignored.
pub fn unsupported(field: &str, what: impl std::fmt::Display) -> Status {
    Status::unimplemented(format!("{field}: {what} is not supported"))
}
