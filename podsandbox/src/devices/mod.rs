//! Devices that containers ask for, by CRI's `devices` or a CDI device's edits:
//! what they are on the node ([`node`]), and what becomes of them in a pod with
//! its own kernel ([`guest`]) and on the host's ([`on_host`]). The pod's driver
//! calls it while it creates a container.

mod access;
pub(crate) mod guest;
pub(crate) mod node;
pub(crate) mod on_host;

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use access::{Access, AccessError};
pub(crate) use node::{Ask, Kind, Node, Stated};

use crate::error::ErrorKind;

/// A device of the node, or all below a directory of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    pub access: Access,
}

/// A block device of the node as a disk of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSlot {
    pub slot: u32,
    pub major: u32,
    pub minor: u32,
    pub read_only: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("{field}: host path {path:?}")]
    Path {
        field: String,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{field}: {path:?} on the node is no device")]
    NotADevice { field: String, path: PathBuf },
    #[error("{field}: {path:?} on the node is {is}, not {stated} as the CDI file says")]
    OtherKind {
        field: String,
        path: PathBuf,
        is: Kind,
        stated: Kind,
    },
    #[error("config.devices: the container has more than {max} devices")]
    TooMany { max: usize },
    #[error(
        "{field}: {path:?} is {kind} of the node, which a pod with its own kernel cannot have: \
         give the pod a RuntimeClass whose handler has `oci`, such as \"host\""
    )]
    NotInGuest {
        field: String,
        path: PathBuf,
        kind: Kind,
    },
    #[error(
        "{field}: container {holder} has {path:?} in this pod read-only; \
         a pod has a block device one way only"
    )]
    ReadOnlyInPod {
        field: String,
        path: PathBuf,
        holder: String,
    },
    #[error("{field}: {path:?} has become another device meanwhile")]
    Changed { field: String, path: PathBuf },
}

impl DeviceError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Path { source, .. } => match source.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::InvalidInput => ErrorKind::InvalidArgument,
                // Opened for writing, or removed from under its path.
                io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                    ErrorKind::FailedPrecondition
                }
                _ => ErrorKind::Internal,
            },
            Self::NotADevice { .. } | Self::OtherKind { .. } | Self::TooMany { .. } => {
                ErrorKind::InvalidArgument
            }
            Self::NotInGuest { .. } | Self::ReadOnlyInPod { .. } | Self::Changed { .. } => {
                ErrorKind::FailedPrecondition
            }
        }
    }
}
