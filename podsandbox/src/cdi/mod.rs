//! Devices of vendors, described by files on the node (Container Device
//! Interface 1.1, <https://github.com/cncf-tags/container-device-interface>): a
//! name such as `vendor.com/class=name` stands for changes to a container.
//!
//! The files are read when a container asks for a device, and only then. Later
//! directories win; two files of one directory that name the same device leave
//! it unknown, as in the reference library. A file that cannot be read is
//! logged and says nothing about the devices of others. The pod's driver calls
//! this.

mod apply;
mod edits;
mod file;
mod name;
mod registry;

use std::path::PathBuf;

pub(crate) use apply::{Extras, add};
pub use name::{ANNOTATION_PREFIX, Name, NameError, requested};
pub(crate) use registry::resolve;

use crate::error::ErrorKind;

#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    #[error("unresolvable CDI devices {names}: {why}")]
    Unresolvable { names: String, why: String },
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(
        "CDI device {device}: its {hook} hook {path:?} runs on the node and knows nothing of a pod \
         with its own kernel: give the pod a RuntimeClass whose handler has `oci`, such as \"host\", \
         or name a device without hooks"
    )]
    HookInGuest {
        device: String,
        hook: &'static str,
        path: PathBuf,
    },
    #[error(
        "CDI device {device}: its {what} is of the node's kernel, which a pod with its own does not \
         have: give the pod a RuntimeClass whose handler has `oci`, such as \"host\""
    )]
    NotInGuest { device: String, what: String },
    #[error("CDI device {device}: {what} is not supported")]
    Unsupported { device: String, what: String },
    #[error("CDI device {device}: mount source {path:?}")]
    MountSource {
        device: String,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl CdiError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Unresolvable { .. } => ErrorKind::NotFound,
            Self::Name(_) => ErrorKind::InvalidArgument,
            Self::HookInGuest { .. }
            | Self::NotInGuest { .. }
            | Self::Unsupported { .. }
            | Self::MountSource { .. } => ErrorKind::FailedPrecondition,
        }
    }
}
