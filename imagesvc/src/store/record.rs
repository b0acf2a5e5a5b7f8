//! What the store keeps on disk, as JSON.

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use crate::{digest::Digest, manifest};

/// An image, with everything that is needed to run it but its layers' content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    /// The digest of `config`.
    pub(crate) id: Digest,
    pub(crate) names: Vec<Name>,
    /// The platform's manifest and configuration, byte for byte.
    pub(crate) manifest: String,
    pub(crate) config: String,
    /// Lowest first.
    pub(crate) layers: Vec<LayerRecord>,
    /// Bytes of the layer that goes on top of them, if the image needs one:
    /// see `imagesvc/unpacker/src/layer/inherit.rs`. It is found by [`Self::chain_id`].
    pub(crate) directories_len: Option<u64>,
}

impl ImageRecord {
    pub(crate) fn chain_id(&self) -> Option<Digest> {
        Digest::chain(self.layers.iter().map(|layer| &layer.diff_id))
    }
}

/// A normalised reference, by tag or by digest, that leads to the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Name {
    pub(crate) name: String,
    /// A name that moves is first written to its new image, then taken from
    /// the old one. After a crash in between, the greater number is right.
    pub(crate) seq: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) digest: Digest,
    pub(crate) diff_id: Digest,
    /// Bytes in the registry.
    pub(crate) compressed_len: u64,
    /// Bytes of the EROFS file.
    pub(crate) len: u64,
}

/// Somebody's claim to an image's layers; complete in itself, since the image
/// may be removed while it lasts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeaseRecord {
    pub(crate) owner: String,
    pub(crate) image: Digest,
    pub(crate) diff_ids: Vec<Digest>,
}

/// A pull that has begun: what it has fetched is kept for its next try.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PullRecord {
    pub(crate) reference: String,
    pub(crate) begun_unix_seconds: u64,
    pub(crate) layers: Vec<PulledLayer>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PulledLayer {
    pub(crate) digest: Digest,
    pub(crate) diff_id: Digest,
}

/// A record and what was parsed from it.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) record: ImageRecord,
    pub(crate) config: ImageConfiguration,
}

impl Stored {
    /// # Errors
    /// A sentence about a record that is not what it says.
    pub(crate) fn new(record: ImageRecord) -> Result<Self, String> {
        if !record.id.matches(record.config.as_bytes()) {
            return Err("its configuration does not have the image's digest".into());
        }
        let (config, _) =
            manifest::parse_config(record.config.as_bytes()).map_err(|e| e.to_string())?;
        Ok(Self { record, config })
    }

    pub(crate) fn has_name(&self, name: &str) -> bool {
        self.record.names.iter().any(|n| n.name == name)
    }

    /// What the image takes on this node, counting shared layers in full.
    pub(crate) fn size(&self) -> u64 {
        let texts = self.record.manifest.len() + self.record.config.len();
        let layers = self.record.layers.iter().map(|l| l.len).sum::<u64>();
        texts as u64 + layers + self.record.directories_len.unwrap_or(0)
    }
}

pub(crate) fn is_digest_name(name: &str) -> bool {
    name.contains('@')
}
