//! What callers see of an image.

use std::path::PathBuf;

use oci_spec::image::ImageConfiguration;

use crate::store::{
    LayerOnDisk,
    record::{Stored, is_digest_name},
};

/// An image on this node.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of the configuration, `sha256:…`.
    pub id: String,
    /// Normalised, such as `docker.io/library/busybox:latest`.
    pub repo_tags: Vec<String>,
    /// Normalised, such as `docker.io/library/busybox@sha256:…`.
    pub repo_digests: Vec<String>,
    /// Bytes on this node's disk; layers shared with other images count in
    /// full.
    pub size: u64,
    /// From the configuration's `User`, when it is a number.
    pub uid: Option<i64>,
    /// From the configuration's `User`, when it is not a number; else empty.
    pub username: String,
    /// Whether the kubelet's garbage collection must spare it.
    pub pinned: bool,
    pub config: ImageConfiguration,
    /// The manifest's text, as the registry sent it.
    pub manifest: String,
    /// Lowest first.
    pub layers: Vec<ImageLayer>,
}

#[derive(Clone, Debug)]
pub struct ImageLayer {
    /// Of the compressed blob.
    pub digest: String,
    /// Of the uncompressed archive.
    pub diff_id: String,
    /// Bytes in the registry.
    pub compressed_size: u64,
    /// Bytes of the EROFS file.
    pub size: u64,
}

/// A layer's EROFS file, read-only, for as long as it is leased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerFile {
    pub path: PathBuf,
    /// Bytes, a multiple of 4096.
    pub len: u64,
}

/// An image whose layers stay until [`crate::ImageService::release`].
#[derive(Clone, Debug)]
pub struct Lease {
    pub image: Image,
    /// What to stack, lowest first: the image's layers, without those that a
    /// layer with an opaque root hides altogether (overlayfs does not heed
    /// the mark there), and on top of them, where the image needs it, one with
    /// the attributes of directories that its archives do not describe.
    pub layers: Vec<LayerFile>,
    pub config: ImageConfiguration,
}

/// The room that images take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsInfo {
    /// A directory in the file system that holds the images.
    pub mountpoint: PathBuf,
    pub used_bytes: u64,
    pub inodes_used: u64,
    pub timestamp_unix_nanos: i64,
}

impl Image {
    pub(crate) fn new(stored: &Stored, pinned: impl Fn(&str) -> bool) -> Self {
        let record = &stored.record;
        let (repo_digests, repo_tags): (Vec<_>, Vec<_>) = record
            .names
            .iter()
            .map(|name| name.name.clone())
            .partition(|name| is_digest_name(name));
        let (uid, username) = user(&stored.config);
        Self {
            id: record.id.to_string(),
            pinned: record.names.iter().any(|name| pinned(&name.name)),
            repo_tags,
            repo_digests,
            size: stored.size(),
            uid,
            username,
            config: stored.config.clone(),
            manifest: record.manifest.clone(),
            layers: record
                .layers
                .iter()
                .map(|layer| ImageLayer {
                    digest: layer.digest.to_string(),
                    diff_id: layer.diff_id.to_string(),
                    compressed_size: layer.compressed_len,
                    size: layer.len,
                })
                .collect(),
        }
    }
}

impl Lease {
    pub(crate) fn new(image: Image, layers: Vec<LayerOnDisk>) -> Self {
        let lowest = layers.iter().rposition(|layer| layer.opaque).unwrap_or(0);
        Self {
            config: image.config.clone(),
            image,
            layers: layers
                .into_iter()
                .skip(lowest)
                .map(|layer| LayerFile {
                    path: layer.path,
                    len: layer.len,
                })
                .collect(),
        }
    }
}

/// `user[:group]`, the user a number or a name.
fn user(config: &ImageConfiguration) -> (Option<i64>, String) {
    let user = config.config().as_ref().and_then(|c| c.user().as_deref());
    let user = user
        .unwrap_or_default()
        .split(':')
        .next()
        .unwrap_or_default();
    match user.parse::<i64>() {
        Ok(uid) if uid >= 0 => (Some(uid), String::new()),
        _ => (None, user.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::parse_config;

    #[test]
    fn the_configured_user_is_a_number_or_a_name() {
        for (given, uid, name) in [
            ("", None, ""),
            ("0", Some(0), ""),
            ("1000:1000", Some(1000), ""),
            ("www-data:www-data", None, "www-data"),
            ("-1", None, "-1"),
        ] {
            let json = format!(
                r#"{{"architecture":"amd64","os":"linux","config":{{"User":"{given}"}},
                    "rootfs":{{"type":"layers","diff_ids":[]}}}}"#
            );
            let (config, _) = parse_config(json.as_bytes()).unwrap();
            assert_eq!(user(&config), (uid, name.to_owned()));
        }
    }
}
