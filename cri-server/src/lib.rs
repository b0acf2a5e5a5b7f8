//! drupe: the node daemon that speaks CRI v1. A library only so that its command
//! line and its fuzzers can have it.
#![forbid(unsafe_code)]

pub mod check;
mod chunks;
pub mod config;
mod convert;
mod deadline;
pub mod debug;
mod dirs;
mod figures;
mod images;
mod lobby;
pub mod overhead;
pub mod prometheus;
mod runtime;
pub mod serve;
pub mod streaming;
pub mod traces;

use std::collections::HashMap;

/// The map in which verbose answers carry their JSON, as crictl prints it.
fn json_info(value: serde_json::Value) -> HashMap<String, String> {
    HashMap::from([("info".to_owned(), value.to_string())])
}
