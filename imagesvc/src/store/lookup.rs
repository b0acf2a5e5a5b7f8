//! From what a person or the kubelet calls an image to the image.

use std::{collections::BTreeMap, sync::Arc};

use super::record::Stored;
use crate::{
    digest::Digest,
    reference::{Reference, is_hex},
};

/// Shortest part of an id that is taken for one: what tools print. A shorter
/// one could as well be a name, and an image can be made to have it.
const MIN_ID_PREFIX: usize = 12;

pub(super) struct Found {
    pub(super) image: Arc<Stored>,
    /// The name that led to it; `None`: the id.
    pub(super) name: Option<String>,
}

/// By id (with or without `sha256:`, whole or an unambiguous beginning), by
/// name with tag or digest, by name alone (tag `latest`). A name goes before
/// the beginning of an id.
pub(super) fn find(images: &BTreeMap<Digest, Arc<Stored>>, query: &str) -> Option<Found> {
    let by_id = |image: &Arc<Stored>| Found {
        image: Arc::clone(image),
        name: None,
    };
    let digits = query.strip_prefix("sha256:").unwrap_or(query);
    if let Ok(id) = format!("sha256:{digits}").parse::<Digest>() {
        return images.get(&id).map(by_id);
    }
    if let Ok(reference) = query.parse::<Reference>() {
        let name = reference.to_string();
        if let Some(image) = images.values().find(|image| image.has_name(&name)) {
            return Some(Found {
                image: Arc::clone(image),
                name: Some(name),
            });
        }
    }
    if digits.len() < MIN_ID_PREFIX || !is_hex(digits) {
        return None;
    }
    let mut matching = images
        .values()
        .filter(|image| image.record.id.hex().starts_with(digits));
    match (matching.next(), matching.next()) {
        (Some(image), None) => Some(by_id(image)),
        _ => None,
    }
}
