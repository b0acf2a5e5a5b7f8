//! Manifests, indexes and image configurations: OCI image spec 1.1 and Docker
//! schema 2, parsed into what a pull needs.

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;
use unpacker_client::Compression;

use crate::{
    digest::{Algorithm, Digest},
    platform::{self, Platform},
};

/// The bound that registries set, and containerd.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// Configurations are some KiB.
pub(crate) const MAX_CONFIG: u64 = 4 << 20;
/// Docker's bound, below that of overlayfs.
pub(crate) const MAX_LAYERS: usize = 127;
/// Indexes in indexes.
pub(crate) const MAX_DEPTH: usize = 4;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

pub(crate) const ACCEPT_MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// Why a manifest or configuration cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("the {what} is malformed: {reason}")]
    Malformed { what: &'static str, reason: String },
    #[error("it is in Docker's schema 1, which was given up in 2019: push it again")]
    Schema1,
    #[error("it is no container image but {media_type}")]
    NotAnImage { media_type: String },
    #[error("layer {digest} is of type {media_type}, which is not supported")]
    LayerType { digest: Digest, media_type: String },
    #[error("layer {digest} is a foreign layer, which no registry holds")]
    ForeignLayer { digest: Digest },
    #[error("the {what} of {size} bytes is larger than {limit}")]
    TooLarge {
        what: &'static str,
        size: u64,
        limit: u64,
    },
    #[error("it has {count} layers, more than {MAX_LAYERS}")]
    TooManyLayers { count: usize },
    #[error("its indexes are nested more than {MAX_DEPTH} deep")]
    TooDeep,
    #[error("it is not made for this node's platform {wanted}; it offers {offered}")]
    Platform { wanted: String, offered: String },
}

/// A manifest document of either kind.
pub(crate) enum Parsed {
    /// The entry for this platform.
    Index(Digest),
    Image(Manifest),
}

/// What an image consists of.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Blob,
    /// Lowest first.
    pub(crate) layers: Vec<LayerBlob>,
}

#[derive(Clone, Debug)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct LayerBlob {
    pub(crate) blob: Blob,
    pub(crate) compression: Compression,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: Option<u32>,
    media_type: Option<String>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    size: u64,
    platform: Option<Platform>,
}

pub(crate) fn parse(bytes: &[u8], content_type: &str) -> Result<Parsed, ManifestError> {
    let document: Document =
        serde_json::from_slice(bytes).map_err(|e| ManifestError::Malformed {
            what: "manifest",
            reason: e.to_string(),
        })?;
    let malformed = |reason: &str| ManifestError::Malformed {
        what: "manifest",
        reason: reason.into(),
    };
    if document.schema_version == Some(1) {
        return Err(ManifestError::Schema1);
    }
    // A header may carry parameters, or say only that this is JSON.
    let header = content_type.split(';').next().unwrap_or_default().trim();
    let known = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];
    let media_type = match document.media_type.as_deref() {
        Some(inside) if known.contains(&header) && header != inside => {
            return Err(malformed("its media type and the registry's differ"));
        }
        Some(inside) => inside,
        None if known.contains(&header) => header,
        None => "",
    };
    // One text read as an index by one client and as an image by another is
    // an attack (CVE-2021-41190).
    match (document.manifests, document.config, document.layers) {
        (Some(manifests), None, None) if matches!(media_type, "" | OCI_INDEX | DOCKER_LIST) => {
            choose(&manifests).map(Parsed::Index)
        }
        (None, Some(config), Some(layers))
            if matches!(media_type, "" | OCI_MANIFEST | DOCKER_MANIFEST) =>
        {
            image(&config, layers).map(Parsed::Image)
        }
        _ if !matches!(media_type, "") && !known.contains(&media_type) => {
            Err(ManifestError::NotAnImage {
                media_type: shorten(media_type),
            })
        }
        _ => Err(malformed("it is neither an index nor an image manifest")),
    }
}

fn choose(manifests: &[Descriptor]) -> Result<Digest, ManifestError> {
    let host = Platform::host();
    let best = manifests
        .iter()
        .filter_map(|entry| {
            let platform = entry.platform.as_ref()?;
            Some((platform::preference(&host, platform)?, entry))
        })
        // The first of equals, as containerd chooses.
        .min_by_key(|(preference, _)| *preference);
    match best {
        Some((_, entry)) => Ok(entry.digest.clone()),
        None => {
            let offered = manifests
                .iter()
                .filter_map(|entry| entry.platform.as_ref())
                .filter(|platform| platform.os != "unknown")
                .map(ToString::to_string)
                .collect::<Vec<_>>();
            Err(no_platform(&host, offered))
        }
    }
}

fn no_platform(host: &Platform, offered: Vec<String>) -> ManifestError {
    ManifestError::Platform {
        wanted: host.to_string(),
        offered: match offered.len() {
            0 => "none".into(),
            _ => shorten(&offered.join(", ")),
        },
    }
}

fn image(config: &Descriptor, layers: Vec<Descriptor>) -> Result<Manifest, ManifestError> {
    if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
        return Err(ManifestError::NotAnImage {
            media_type: shorten(&config.media_type),
        });
    }
    if config.size > MAX_CONFIG {
        return Err(ManifestError::TooLarge {
            what: "configuration",
            size: config.size,
            limit: MAX_CONFIG,
        });
    }
    if layers.len() > MAX_LAYERS {
        return Err(ManifestError::TooManyLayers {
            count: layers.len(),
        });
    }
    Ok(Manifest {
        config: Blob {
            digest: config.digest.clone(),
            size: config.size,
        },
        layers: layers
            .into_iter()
            .map(|layer| {
                Ok(LayerBlob {
                    compression: compression(&layer)?,
                    blob: Blob {
                        digest: layer.digest,
                        size: layer.size,
                    },
                })
            })
            .collect::<Result<_, _>>()?,
    })
}

fn compression(layer: &Descriptor) -> Result<Compression, ManifestError> {
    match layer.media_type.as_str() {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar" => Ok(Compression::None),
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Compression::Gzip),
        "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Compression::Zstd),
        foreign if foreign.contains(".foreign.") || foreign.contains(".nondistributable.") => {
            Err(ManifestError::ForeignLayer {
                digest: layer.digest.clone(),
            })
        }
        other => Err(ManifestError::LayerType {
            digest: layer.digest.clone(),
            media_type: shorten(other),
        }),
    }
}

/// A configuration, and the digest of each layer's uncompressed archive.
pub(crate) fn parse_config(
    bytes: &[u8],
) -> Result<(ImageConfiguration, Vec<Digest>), ManifestError> {
    let malformed = |reason: String| ManifestError::Malformed {
        what: "configuration",
        reason,
    };
    let mut json: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|e| malformed(e.to_string()))?;
    // Go writes empty maps and lists as null.
    strip_nulls(&mut json);
    let config: ImageConfiguration =
        serde_json::from_value(json).map_err(|e| malformed(e.to_string()))?;
    let diff_ids = config
        .rootfs()
        .diff_ids()
        .iter()
        .map(|text| text.parse::<Digest>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| malformed(format!("diff_ids: {e}")))?;
    // The conversion computes no other digest.
    if let Some(other) = diff_ids.iter().find(|d| d.algorithm() != Algorithm::Sha256) {
        return Err(malformed(format!(
            "diff_ids: {other} is not a sha256 digest"
        )));
    }
    Ok((config, diff_ids))
}

/// Checks what an index may not have said.
pub(crate) fn check_platform(config: &ImageConfiguration) -> Result<(), ManifestError> {
    let host = Platform::host();
    let platform = Platform {
        os: config.os().to_string(),
        architecture: config.architecture().to_string(),
        variant: config.variant().clone(),
    };
    match platform::preference(&host, &platform) {
        Some(_) => Ok(()),
        None => Err(no_platform(&host, vec![platform.to_string()])),
    }
}

fn strip_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        serde_json::Value::Array(list) => list.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

/// A stranger's text in a message.
fn shorten(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(160).collect()
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
