//! The layer that an image needs on top of its own, for directories that a
//! layer has but does not describe.

use std::fs::File;

use crate::{
    digest::Digest,
    error::{LayerError, StoreError},
    store::Files,
    unpack::Unpacking,
};

/// Puts it in its place and gives its length; None: the image needs none. The
/// layers, lowest first, are there and claimed.
pub(super) fn restore(
    files: &Files,
    unpacking: &Unpacking,
    diff_ids: &[Digest],
) -> Result<Option<u64>, LayerError> {
    let Some(chain_id) = Digest::chain(diff_ids) else {
        return Ok(None);
    };
    // The lowest layer's are as it says.
    if diff_ids.len() == 1 {
        return Ok(None);
    }
    if let Some(len) = files.find_directories(&chain_id)? {
        return Ok(Some(len));
    }
    let mut layers = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let path = match files.find_layer(diff_id)? {
            Some(on_disk) => on_disk.path,
            None => files.layer(diff_id, false),
        };
        layers.push(File::open(&path).map_err(|e| StoreError::io(path, e))?);
    }
    let file = files.temporary()?;
    let Some(len) = unpacking.directories(&chain_id, &layers, file.as_file())? else {
        return Ok(None);
    };
    files.publish(file, &files.directories(&chain_id))?;
    tracing::debug!(%chain_id, len, "directories restored");
    Ok(Some(len))
}
