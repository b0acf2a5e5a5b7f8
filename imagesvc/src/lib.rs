//! OCI images on this node: pulled, verified, converted to EROFS by unpackers,
//! accounted for and collected.
//!
//! [`ImageService`] is the whole interface; `cri-server` calls it for the CRI
//! image API, `podsandbox` for the root of a container ([`ImageService::lease`]).
//!
//! ```text
//! service ─▶ pull ─▶ registry   manifests and blobs, verified
//!    │         ├──▶ unpack     layer in, file system out, by other processes
//!    └────────▶└──▶ store      what is on disk, and who claims it
//! ```
#![forbid(unsafe_code)]

mod auth;
mod config;
mod digest;
mod error;
mod flight;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
mod image;
mod lock;
mod manifest;
mod observer;
mod platform;
pub mod private_cache;
mod pull;
mod reference;
mod registry;
mod service;
mod store;
mod unpack;

pub use auth::Auth;
pub use config::{ConfigError, ImageServiceConfig, RegistryConfig};
pub use digest::{Digest, InvalidDigest};
pub use error::{Error, ErrorKind, LayerError, StoreError};
pub use image::{FsInfo, Image, ImageLayer, LayerFile, Lease};
pub use lock::lock;
pub use manifest::ManifestError;
pub use observer::{Observer, PullOutcome};
pub use reference::{InvalidReference, Reference, Selector};
pub use registry::RegistryError;
pub use service::{ImageService, PulledImage};
pub use unpacker_client::Unpacker;
