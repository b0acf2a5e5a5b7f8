//! Why a registry did not deliver. Each sentence names the host.

use crate::error::ErrorKind;

#[derive(Clone, Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("the TLS client cannot be set up: {reason}")]
    Tls { reason: String },
    #[error("{url} is not usable as a registry's URL: {reason}")]
    Url { url: String, reason: String },
    #[error("registry {host} cannot be reached: {reason}")]
    Unreachable { host: String, reason: String },
    #[error("registry {host} sent nothing for {seconds} s, {bytes} bytes into {what}")]
    NoProgress {
        host: String,
        what: String,
        bytes: u64,
        seconds: u64,
    },
    #[error("the connection to registry {host} was cut {bytes} bytes into {what}: {reason}")]
    Cut {
        host: String,
        what: String,
        bytes: u64,
        reason: String,
    },
    #[error("registry {host} denies {what}: {reason}")]
    Unauthorized {
        host: String,
        what: String,
        reason: String,
    },
    #[error("registry {host} has no {what}{reason}")]
    NotFound {
        host: String,
        what: String,
        /// Empty, or the registry's words after a colon.
        reason: String,
    },
    #[error("registry {host} answered the request for {what} with {status}{reason}")]
    Status {
        host: String,
        what: String,
        status: u16,
        /// Empty, or the registry's words after a colon.
        reason: String,
    },
    #[error("registry {host} sent more than {limit} bytes for {what}")]
    TooLarge {
        host: String,
        what: String,
        limit: u64,
    },
    #[error("registry {host} sent a corrupt {what}: {reason}")]
    Corrupt {
        host: String,
        what: String,
        reason: String,
    },
    #[error("{last}; before that, {mirrors}")]
    MirrorsToo {
        last: Box<RegistryError>,
        mirrors: String,
    },
}

impl RegistryError {
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Tls { .. } | Self::Url { .. } => ErrorKind::Internal,
            Self::Unreachable { .. } | Self::Cut { .. } => ErrorKind::Unavailable,
            Self::NoProgress { .. } => ErrorKind::DeadlineExceeded,
            Self::Unauthorized { .. } => ErrorKind::Unauthorized,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Status { .. } => ErrorKind::Unavailable,
            Self::TooLarge { .. } => ErrorKind::ResourceExhausted,
            Self::Corrupt { .. } => ErrorKind::Corrupt,
            Self::MirrorsToo { last, .. } => last.kind(),
        }
    }
}
