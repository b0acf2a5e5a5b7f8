//! The client side of the OCI distribution spec 1.1: manifests and blobs of
//! one repository, from its registry's mirrors or the registry itself.
//!
//! [`Session`] is what a pull holds: one [`host::Host`] for each place, each
//! with its own connections and tokens. A host that fails is not asked again
//! in the same pull.
//!
//! Not `oci-client`: that reads manifests without a bound, knows no identity
//! tokens and no mirror with a path or certificates of its own.

mod blob;
mod body;
mod endpoint;
mod error;
mod host;
pub(crate) mod tls;
mod token;

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use reqwest::{Method, header::CONTENT_TYPE};
use tokio::sync::mpsc;

pub(crate) use blob::Delivery;
pub use error::RegistryError;
use host::{Ask, Host};

use crate::{
    auth::Credentials,
    config::ImageServiceConfig,
    digest::Digest,
    manifest::{ACCEPT_MANIFESTS, MAX_MANIFEST},
    reference::{Reference, Selector},
};

/// Docker's name for the digest of what is sent.
const DOCKER_CONTENT_DIGEST: &str = "docker-content-digest";

pub(crate) struct Session {
    /// Mirrors first; never empty.
    hosts: Vec<Host>,
    /// Those before this index have failed.
    first: AtomicUsize,
    registry: String,
}

/// A manifest as the registry sent it.
pub(crate) struct Document {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
    pub(crate) content_type: String,
}

impl Session {
    /// Reads certificate files: call it where blocking is allowed.
    pub(crate) fn new(
        config: &ImageServiceConfig,
        reference: &Reference,
        credentials: Option<&Credentials>,
    ) -> Result<Self, RegistryError> {
        let hosts = endpoint::endpoints(config, reference.registry())?
            .into_iter()
            .map(|endpoint| {
                Host::new(
                    endpoint,
                    credentials,
                    reference.repository(),
                    config.no_progress(),
                )
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            hosts,
            first: AtomicUsize::new(0),
            registry: reference.registry().to_owned(),
        })
    }

    fn candidates(&self) -> impl Iterator<Item = (usize, &Host)> {
        let first = self.first.load(Ordering::Relaxed);
        self.hosts.iter().enumerate().skip(first)
    }

    /// The manifest or index that `selector` names, its digest verified.
    pub(crate) async fn manifest(&self, selector: &Selector) -> Result<Document, RegistryError> {
        let mut failures = Vec::new();
        for (index, host) in self.candidates() {
            match manifest_from(host, selector).await {
                Ok(document) => {
                    self.first.store(index, Ordering::Relaxed);
                    return Ok(document);
                }
                Err(error) => failures.push(error),
            }
        }
        Err(self.sum_up(failures))
    }

    /// What a tag points to, without counting as a download. `None` where the
    /// registry does not say.
    pub(crate) async fn resolve(&self, selector: &Selector) -> Option<Digest> {
        let (_, host) = self.candidates().next()?;
        let path = format!("manifests/{selector}");
        let ask = Ask {
            method: Method::HEAD,
            path: &path,
            what: "manifest",
            accept: Some(ACCEPT_MANIFESTS),
            offset: 0,
        };
        let response = host.send(&ask).await.ok()?;
        let digest = response.headers().get(DOCKER_CONTENT_DIGEST)?;
        digest.to_str().ok()?.parse().ok()
    }

    /// A blob of known size that fits in memory, verified.
    pub(crate) async fn small_blob(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let mut failures = Vec::new();
        for (_, host) in self.candidates() {
            match small_blob_from(host, digest, size).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => failures.push(error),
            }
        }
        Err(self.sum_up(failures))
    }

    /// Sends a blob's bytes from `offset` on to `sink`; nothing is verified.
    pub(crate) async fn deliver(
        &self,
        digest: &Digest,
        size: u64,
        mut offset: u64,
        sink: &mpsc::Sender<Bytes>,
    ) -> Result<Delivery, RegistryError> {
        let mut failures = Vec::new();
        for (_, host) in self.candidates() {
            match host.deliver(digest, size, &mut offset, sink).await {
                Ok(delivery) => return Ok(delivery),
                Err(error) => failures.push(error),
            }
        }
        Err(self.sum_up(failures))
    }

    /// The registry's own failure says most; its mirrors' are added.
    fn sum_up(&self, mut failures: Vec<RegistryError>) -> RegistryError {
        let Some(last) = failures.pop() else {
            return RegistryError::Unreachable {
                host: self.registry.clone(),
                reason: "nothing is configured to reach it".into(),
            };
        };
        if failures.is_empty() {
            return last;
        }
        let mirrors: Vec<String> = failures.iter().map(ToString::to_string).collect();
        RegistryError::MirrorsToo {
            last: Box::new(last),
            mirrors: mirrors.join("; "),
        }
    }
}

async fn manifest_from(host: &Host, selector: &Selector) -> Result<Document, RegistryError> {
    let what = format!("manifest {selector}");
    let ask = Ask {
        method: Method::GET,
        path: &format!("manifests/{selector}"),
        what: &what,
        accept: Some(ACCEPT_MANIFESTS),
        offset: 0,
    };
    let response = host.send(&ask).await?;
    let header = |name| {
        let value = response.headers().get(name)?;
        value.to_str().ok().map(str::to_owned)
    };
    let content_type = header(CONTENT_TYPE.as_str()).unwrap_or_default();
    let announced = header(DOCKER_CONTENT_DIGEST).and_then(|d| d.parse::<Digest>().ok());
    let bytes = host.read(response, &what, MAX_MANIFEST).await?;
    let expected = match selector {
        Selector::Digest(digest) => Some(digest.clone()),
        Selector::Tag(_) => announced,
    };
    if let Some(expected) = &expected
        && !expected.matches(&bytes)
    {
        return Err(RegistryError::Corrupt {
            host: host.endpoint.host.clone(),
            what,
            reason: format!("its digest is not {expected}"),
        });
    }
    Ok(Document {
        digest: expected.unwrap_or_else(|| Digest::of(&bytes)),
        bytes,
        content_type,
    })
}

async fn small_blob_from(
    host: &Host,
    digest: &Digest,
    size: u64,
) -> Result<Vec<u8>, RegistryError> {
    let what = format!("blob {digest}");
    let ask = Ask {
        method: Method::GET,
        path: &format!("blobs/{digest}"),
        what: &what,
        accept: None,
        offset: 0,
    };
    let response = host.send(&ask).await?;
    let reason = match host.read(response, &what, size).await {
        Ok(bytes) if digest.matches(&bytes) => return Ok(bytes),
        Ok(bytes) => format!(
            "{} bytes came that are not what the digest names",
            bytes.len()
        ),
        Err(RegistryError::TooLarge { .. }) => {
            format!("it is longer than the {size} bytes announced")
        }
        Err(error) => return Err(error),
    };
    Err(RegistryError::Corrupt {
        host: host.endpoint.host.clone(),
        what,
        reason,
    })
}

/// The innermost cause: what the layers above wrap around it says less.
fn cause(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
