//! What callers of the image service are told: one sentence that names the
//! image, the registry or path, and the cause.

use std::{io, path::PathBuf, sync::Arc};

use crate::{
    config::ConfigError, digest::Digest, manifest::ManifestError, reference::InvalidReference,
    registry::RegistryError,
};

/// What a gRPC service makes a status code of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A malformed reference, credential or configuration.
    InvalidArgument,
    /// No such image, here or in the registry, or not for this platform.
    NotFound,
    Unauthorized,
    /// The registry cannot be reached or is out of order.
    Unavailable,
    /// Content that is not what its digest names, or no valid layer.
    Corrupt,
    /// An image of a kind that drupe does not run, or a setting that the node's
    /// file system cannot keep.
    Unsupported,
    /// A full disk, or an image beyond the configured bounds.
    ResourceExhausted,
    /// The registry sent nothing for too long.
    DeadlineExceeded,
    Cancelled,
    /// The node's kernel lacks a part of the unpackers' jail, all of which is
    /// required.
    Unconfined,
    /// The node's own fault, such as an I/O error.
    Internal,
}

impl ErrorKind {
    pub const ALL: [Self; 11] = [
        Self::InvalidArgument,
        Self::NotFound,
        Self::Unauthorized,
        Self::Unavailable,
        Self::Corrupt,
        Self::Unsupported,
        Self::ResourceExhausted,
        Self::DeadlineExceeded,
        Self::Cancelled,
        Self::Unconfined,
        Self::Internal,
    ];
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("image service configuration: {0}")]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    #[error("there is no image {image:?} on this node")]
    NoSuchImage { image: String },
    #[error("the credentials for image {image} are malformed: {reason}")]
    Credentials { image: String, reason: &'static str },
    #[error("image {image}: {source}")]
    Registry {
        image: String,
        source: RegistryError,
    },
    #[error("image {image} of registry {registry}: {source}")]
    Manifest {
        image: String,
        registry: String,
        source: ManifestError,
    },
    #[error("image {image} of registry {registry}: layer {digest}: {source}")]
    Layer {
        image: String,
        registry: String,
        digest: Digest,
        source: Box<LayerError>,
    },
    #[error("image {image}: the directories that no archive describes: {source}")]
    Directories {
        image: String,
        source: Box<LayerError>,
    },
    #[error("image store: {0}")]
    Store(#[from] StoreError),
    #[error(
        "{} cannot be opened apart from the node's cached pages: `images.private_cache` takes a \
         file system with clones, Btrfs or XFS with reflink: {source}",
        path.display()
    )]
    PrivateCache {
        path: PathBuf,
        source: Arc<io::Error>,
    },
    #[error("the pull of image {image} was stopped")]
    Stopped { image: String },
}

/// Why one layer could not be had. Shared by all pulls that wait for it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LayerError {
    #[error("{0}")]
    Registry(#[from] RegistryError),
    #[error("its bytes are corrupt: their digest is {actual}")]
    Digest { actual: Digest },
    #[error(
        "its content has digest {actual} uncompressed, but the image's configuration says {expected}"
    )]
    DiffId { expected: Digest, actual: Digest },
    #[error("{reason}")]
    Content { kind: ErrorKind, reason: String },
    /// A process that unpacks it did not do what it is there for.
    #[error("it cannot be unpacked: {reason}")]
    Unpacker { reason: String },
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("its transfer was stopped")]
    Stopped,
}

/// The node's disk failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: Arc<io::Error>,
    },
    #[error("{} is in use by another process", path.display())]
    InUse { path: PathBuf },
    #[error("a task of the image store ended unexpectedly")]
    Task,
}

impl Error {
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config(_) | Self::Reference(_) | Self::Credentials { .. } => {
                ErrorKind::InvalidArgument
            }
            Self::NoSuchImage { .. } => ErrorKind::NotFound,
            Self::Registry { source, .. } => source.kind(),
            Self::Manifest { source, .. } => manifest_kind(source),
            Self::Layer { source, .. } | Self::Directories { source, .. } => source.kind(),
            Self::Store(error) => error.kind(),
            Self::PrivateCache { source, .. } if is_full(source) => ErrorKind::ResourceExhausted,
            Self::PrivateCache { .. } => ErrorKind::Unsupported,
            Self::Stopped { .. } => ErrorKind::Cancelled,
        }
    }
}

fn manifest_kind(error: &ManifestError) -> ErrorKind {
    match error {
        ManifestError::Malformed { .. } => ErrorKind::Corrupt,
        ManifestError::Schema1
        | ManifestError::NotAnImage { .. }
        | ManifestError::LayerType { .. }
        | ManifestError::ForeignLayer { .. } => ErrorKind::Unsupported,
        ManifestError::TooLarge { .. }
        | ManifestError::TooManyLayers { .. }
        | ManifestError::TooDeep => ErrorKind::ResourceExhausted,
        ManifestError::Platform { .. } => ErrorKind::NotFound,
    }
}

impl LayerError {
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Registry(error) => error.kind(),
            Self::Digest { .. } | Self::DiffId { .. } => ErrorKind::Corrupt,
            Self::Content { kind, .. } => *kind,
            Self::Unpacker { .. } => ErrorKind::Internal,
            Self::Store(error) => error.kind(),
            Self::Stopped => ErrorKind::Cancelled,
        }
    }

    /// Whether another try may go on with the bytes that are there.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(
            self.kind(),
            ErrorKind::Unavailable
                | ErrorKind::DeadlineExceeded
                | ErrorKind::Unauthorized
                | ErrorKind::NotFound
                | ErrorKind::Cancelled
        )
    }
}

impl StoreError {
    pub(crate) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source: Arc::new(source),
        }
    }

    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } if is_full(source) => ErrorKind::ResourceExhausted,
            _ => ErrorKind::Internal,
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

#[cfg(test)]
mod tests {
    use unpacker_client::Failure;

    use super::*;

    #[test]
    fn a_jail_that_is_not_whole_is_told_with_the_key_that_wants_it() {
        let failure = Failure::Unconfined {
            reason: "the node's kernel lacks Landlock".to_owned(),
        };
        let error = LayerError::from(failure);
        assert_eq!(error.kind(), ErrorKind::Unconfined);
        let text = error.to_string();
        assert!(
            text.contains("lacks Landlock") && text.contains("`confinement: required`"),
            "{text}"
        );
    }
}
