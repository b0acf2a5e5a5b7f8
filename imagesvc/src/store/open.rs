//! Opening the store: what a crash, a power cut or a stranger left is put in
//! order before anybody sees it.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, RwLock},
};

use serde::de::DeserializeOwned;

use super::{
    Files, State, Store, files,
    record::{ImageRecord, LeaseRecord, PullRecord, Stored},
};
use crate::{digest::Digest, error::StoreError};

impl Store {
    /// Takes the store at `root` for this process alone.
    pub(crate) fn open(root: &Path) -> Result<Arc<Self>, StoreError> {
        let files = Files::create(root)?;
        let lock_path = files.lock();
        let lock = File::create(&lock_path).map_err(|e| StoreError::io(&lock_path, e))?;
        if !crate::lock(&lock).map_err(|e| StoreError::io(lock_path, e))? {
            return Err(StoreError::InUse {
                path: root.to_owned(),
            });
        }
        for path in files::list(&files.tmp())? {
            files::remove_file(&path)?;
        }
        files.remove_other_versions()?;
        let mut state = State::default();
        load_images(&files, &mut state)?;
        for (path, lease) in records::<LeaseRecord>(&files, &files.leases())? {
            tracing::debug!(path = %path.display(), owner = lease.owner, "lease");
            state.leases.insert(lease.owner.clone(), lease);
        }
        for (path, pull) in records::<PullRecord>(&files, &files.pulls())? {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let Ok(id) = stem.parse::<u64>() else {
                discard(&files, &path, "its name is not a number")?;
                continue;
            };
            state.next_pull = state.next_pull.max(id + 1);
            state.pulls.insert(id, pull);
        }
        let store = Arc::new(Self {
            files,
            published: RwLock::new(Arc::new(state.images.clone())),
            state: Mutex::new(state),
            live: Mutex::new(HashSet::new()),
            _lock: lock,
        });
        store.collect()?;
        Ok(store)
    }
}

/// Loads the images that are whole and gives each name to one of them.
fn load_images(files: &Files, state: &mut State) -> Result<(), StoreError> {
    let mut owner_of: HashMap<String, (u64, Digest)> = HashMap::new();
    let mut images = Vec::new();
    for (path, record) in records::<ImageRecord>(files, &files.images())? {
        match check(files, &path, record)? {
            Ok(stored) => images.push(stored),
            Err(reason) => discard(files, &path, &reason)?,
        }
    }
    for image in &images {
        for name in &image.record.names {
            state.next_name = state.next_name.max(name.seq + 1);
            let newest = owner_of
                .entry(name.name.clone())
                .or_insert_with(|| (name.seq, image.record.id.clone()));
            if newest.0 < name.seq {
                *newest = (name.seq, image.record.id.clone());
            }
        }
    }
    for mut image in images {
        let id = image.record.id.clone();
        let owned = |name: &str| owner_of.get(name).is_some_and(|(_, owner)| *owner == id);
        image.record.names.retain(|name| owned(&name.name));
        state.images.insert(id, Arc::new(image));
    }
    Ok(())
}

/// The inner error is a sentence about an image that cannot be used.
fn check(
    files: &Files,
    path: &Path,
    record: ImageRecord,
) -> Result<Result<Stored, String>, StoreError> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    if stem != record.id.hex() {
        return Ok(Err("its file is named for another image".into()));
    }
    for layer in &record.layers {
        let reason = match files.find_layer(&layer.diff_id)? {
            None => "is missing".to_owned(),
            Some(found) if found.len != layer.len => {
                format!("has {} bytes instead of {}", found.len, layer.len)
            }
            Some(_) => continue,
        };
        return Ok(Err(format!("its layer {} {reason}", layer.diff_id)));
    }
    if let (Some(len), Some(chain_id)) = (record.directories_len, record.chain_id())
        && files.find_directories(&chain_id)? != Some(len)
    {
        return Ok(Err("the layer of its directories is missing or cut".into()));
    }
    Ok(Stored::new(record))
}

/// The records of a directory that can be read; the others are deleted.
fn records<T: DeserializeOwned>(
    files: &Files,
    dir: &Path,
) -> Result<Vec<(PathBuf, T)>, StoreError> {
    let mut records = Vec::new();
    for path in files::list(dir)? {
        let bytes = fs::read(&path).map_err(|e| StoreError::io(&path, e))?;
        match serde_json::from_slice(&bytes) {
            Ok(record) => records.push((path, record)),
            Err(error) => discard(files, &path, &error.to_string())?,
        }
    }
    Ok(records)
}

fn discard(files: &Files, path: &Path, reason: &str) -> Result<(), StoreError> {
    tracing::warn!(path = %path.display(), reason, "record of the image store dropped");
    files.remove_record(path)
}
