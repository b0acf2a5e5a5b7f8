//! What is on the node's disk: images, their layers, leases, pulls under way.
//!
//! Plain files, each written aside and renamed into place; see [`Files`] for
//! the layout. One record an image, so that removing needs no space: on a full
//! disk an image can always be deleted. All methods block; the service calls
//! them from blocking threads.
//!
//! A layer belongs to whoever names it: images, leases, and pulls that began
//! less than [`PULL_KEEP`] ago. [`Store::collect`] deletes the others, under
//! the same lock as every claim is made, so a claimed layer stays.

mod files;
mod lookup;
mod open;
pub(crate) mod record;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

pub(crate) use files::{Files, LayerOnDisk, remove_file};

use crate::{digest::Digest, error::StoreError};
use files::LayerName;
use record::{ImageRecord, LayerRecord, LeaseRecord, Name, PullRecord, PulledLayer, Stored};

/// How long an interrupted pull's bytes wait for the next try. The kubelet's
/// longest back-off is five minutes; a node may be down overnight.
const PULL_KEEP: Duration = Duration::from_secs(24 * 3600);

pub(crate) struct Store {
    files: Files,
    state: Mutex<State>,
    /// The images of `state`, for readers that must not wait for the disk.
    published: RwLock<Images>,
    /// Pulls whose owner is alive; taken after `state`, never before.
    live: Mutex<HashSet<u64>>,
    /// Held for the store's life.
    _lock: File,
}

type Images = Arc<BTreeMap<Digest, Arc<Stored>>>;

#[derive(Default)]
struct State {
    images: BTreeMap<Digest, Arc<Stored>>,
    /// By owner.
    leases: BTreeMap<String, LeaseRecord>,
    pulls: HashMap<u64, PullRecord>,
    next_pull: u64,
    next_name: u64,
}

/// A pull's claim to what it fetches. Dropped, the claim stays on disk for the
/// next try.
pub(crate) struct PullTicket {
    store: Arc<Store>,
    id: u64,
}

/// An image whose layers stay.
pub(crate) struct Leased {
    pub(crate) image: Arc<Stored>,
    /// Lowest first, the one that restores directories included.
    pub(crate) layers: Vec<LayerOnDisk>,
}

/// An image that was pulled whole.
pub(crate) struct NewImage {
    pub(crate) id: Digest,
    pub(crate) names: Vec<String>,
    pub(crate) manifest: String,
    pub(crate) config: String,
    pub(crate) layers: Vec<LayerRecord>,
    pub(crate) directories_len: Option<u64>,
}

impl Store {
    pub(crate) fn files(&self) -> &Files {
        &self.files
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state follows the disk step by step: what a panic leaves is true.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never waits for the disk; nor do [`Self::find`] and [`Self::by_id`].
    pub(crate) fn images(&self) -> Images {
        let published = self.published.read();
        Arc::clone(&published.unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn find(&self, query: &str) -> Option<Arc<Stored>> {
        lookup::find(&self.images(), query).map(|found| found.image)
    }

    pub(crate) fn by_id(&self, id: &Digest) -> Option<Arc<Stored>> {
        self.images().get(id).cloned()
    }

    /// Shows readers what was changed.
    fn publish(&self, state: &State) {
        let images = Arc::new(state.images.clone());
        let published = self.published.write();
        *published.unwrap_or_else(PoisonError::into_inner) = images;
    }

    /// Claims the layers of a pull. Claims of earlier tries at the same
    /// reference end: this one goes on with what they left.
    pub(crate) fn begin_pull(
        self: &Arc<Self>,
        reference: &str,
        layers: Vec<PulledLayer>,
    ) -> Result<PullTicket, StoreError> {
        let mut state = self.state();
        let id = state.next_pull;
        state.next_pull += 1;
        let record = PullRecord {
            reference: reference.to_owned(),
            begun_unix_seconds: unix_seconds(),
            layers,
        };
        self.files.write_record(&self.pull_path(id), &record)?;
        state.pulls.insert(id, record);
        self.live().insert(id);
        let ticket = PullTicket {
            store: Arc::clone(self),
            id,
        };
        self.end_stale_pulls(&mut state, |pull| pull.reference == reference)?;
        Ok(ticket)
    }

    fn pull_path(&self, id: u64) -> std::path::PathBuf {
        self.files.pulls().join(format!("{id}.json"))
    }

    /// Ends those of the matching pulls that nobody is at.
    fn end_stale_pulls(
        &self,
        state: &mut State,
        matches: impl Fn(&PullRecord) -> bool,
    ) -> Result<(), StoreError> {
        let live = self.live().clone();
        let stale: Vec<u64> = state
            .pulls
            .iter()
            .filter(|(id, pull)| !live.contains(id) && matches(pull))
            .map(|(id, _)| *id)
            .collect();
        for id in stale {
            self.end_pull(state, id)?;
        }
        Ok(())
    }

    fn end_pull(&self, state: &mut State, id: u64) -> Result<(), StoreError> {
        self.files.remove_record(&self.pull_path(id))?;
        state.pulls.remove(&id);
        Ok(())
    }

    /// Makes a whole image visible, moves its names to it, ends the pull.
    pub(crate) fn commit(&self, ticket: &PullTicket, new: NewImage) -> Result<(), StoreError> {
        let mut state = self.state();
        let state = &mut *state;
        let mut names: Vec<Name> = match state.images.get(&new.id) {
            Some(known) => known.record.names.clone(),
            None => Vec::new(),
        };
        names.retain(|name| !new.names.contains(&name.name));
        for name in &new.names {
            names.push(Name {
                name: name.clone(),
                seq: state.next_name,
            });
            state.next_name += 1;
        }
        let image = self.write_image(ImageRecord {
            id: new.id.clone(),
            names,
            manifest: new.manifest,
            config: new.config,
            layers: new.layers,
            directories_len: new.directories_len,
        })?;
        state.images.insert(new.id.clone(), image);
        for other in state.images.values_mut() {
            let moved = |name: &Name| new.names.contains(&name.name);
            if other.record.id == new.id || !other.record.names.iter().any(moved) {
                continue;
            }
            let mut stored = Stored::clone(other);
            stored.record.names.retain(|name| !moved(name));
            // Should this write fail, opening the store settles it by `seq`.
            if let Err(error) = self
                .files
                .write_record(&self.image_path(&stored.record.id), &stored.record)
            {
                tracing::warn!(image = %stored.record.id, %error, "a moved tag is still on disk");
            }
            *other = Arc::new(stored);
        }
        self.publish(state);
        self.end_pull(state, ticket.id)
    }

    fn image_path(&self, id: &Digest) -> std::path::PathBuf {
        self.files.images().join(format!("{}.json", id.hex()))
    }

    fn write_image(&self, record: ImageRecord) -> Result<Arc<Stored>, StoreError> {
        let path = self.image_path(&record.id);
        self.files.write_record(&path, &record)?;
        let stored = Stored::new(record)
            .map_err(|reason| StoreError::io(path, std::io::Error::other(reason)))?;
        Ok(Arc::new(stored))
    }

    /// Removes what `query` names: by id the image with all its names, by name
    /// that name, and the image with its last one (for a tag: its last tag).
    /// What is not there is no error.
    pub(crate) fn remove(&self, query: &str) -> Result<(), StoreError> {
        let mut state = self.state();
        if let Some(found) = lookup::find(&state.images, query) {
            let mut record = found.image.record.clone();
            let whole = match &found.name {
                None => true,
                Some(name) => {
                    record.names.retain(|n| n.name != *name);
                    let only_tags = !record::is_digest_name(name);
                    !record
                        .names
                        .iter()
                        .any(|n| !only_tags || !record::is_digest_name(&n.name))
                }
            };
            if whole {
                self.files.remove_record(&self.image_path(&record.id))?;
                state.images.remove(&record.id);
            } else {
                let image = self.write_image(record)?;
                state.images.insert(image.record.id.clone(), image);
            }
            self.publish(&state);
        }
        self.collect_locked(&mut state)
    }

    /// Keeps the layers of an image for `owner`, in place of what it had.
    pub(crate) fn lease(&self, query: &str, owner: &str) -> Result<Option<Leased>, StoreError> {
        let mut state = self.state();
        let Some(image) = lookup::find(&state.images, query).map(|found| found.image) else {
            return Ok(None);
        };
        let mut layers = Vec::with_capacity(image.record.layers.len());
        for layer in &image.record.layers {
            let Some(on_disk) = self.files.find_layer(&layer.diff_id)? else {
                let path = self.files.layer(&layer.diff_id, false);
                return Err(StoreError::io(path, std::io::ErrorKind::NotFound.into()));
            };
            layers.push(on_disk);
        }
        if let (Some(len), Some(chain_id)) = (image.record.directories_len, image.record.chain_id())
        {
            layers.push(LayerOnDisk {
                path: self.files.directories(&chain_id),
                len,
                opaque: false,
            });
        }
        let lease = LeaseRecord {
            owner: owner.to_owned(),
            image: image.record.id.clone(),
            diff_ids: image
                .record
                .layers
                .iter()
                .map(|l| l.diff_id.clone())
                .collect(),
        };
        if state.leases.get(owner) != Some(&lease) {
            // Not synced: a lease need not outlive a power cut, since nothing
            // that runs does, and a container's start waits for it.
            self.files
                .write_record_unsynced(&self.lease_path(owner), &lease)?;
            state.leases.insert(owner.to_owned(), lease);
        }
        Ok(Some(Leased { image, layers }))
    }

    /// Ends a lease; one that is not there is no error.
    pub(crate) fn release(&self, owner: &str) -> Result<(), StoreError> {
        let mut state = self.state();
        let Some(lease) = state.leases.get(owner) else {
            return Ok(());
        };
        let image_is_gone = !state.images.contains_key(&lease.image);
        self.files.remove_record(&self.lease_path(owner))?;
        state.leases.remove(owner);
        if image_is_gone {
            self.collect_locked(&mut state)?;
        }
        Ok(())
    }

    pub(crate) fn leases(&self) -> Vec<(String, Digest)> {
        let state = self.state();
        let leases = state.leases.values();
        leases.map(|l| (l.owner.clone(), l.image.clone())).collect()
    }

    /// Owners may be any text: the file is named by its digest.
    fn lease_path(&self, owner: &str) -> std::path::PathBuf {
        let name = Digest::of(owner.as_bytes());
        self.files.leases().join(format!("{}.json", name.hex()))
    }

    /// Deletes layers and partial downloads that nobody claims.
    pub(crate) fn collect(&self) -> Result<(), StoreError> {
        self.collect_locked(&mut self.state())
    }

    fn collect_locked(&self, state: &mut State) -> Result<(), StoreError> {
        let now = unix_seconds();
        self.end_stale_pulls(state, |pull| {
            now.saturating_sub(pull.begun_unix_seconds) > PULL_KEEP.as_secs()
        })?;
        let mut claimed = HashSet::new();
        for image in state.images.values() {
            claim(&mut claimed, image.record.layers.iter().map(|l| &l.diff_id));
        }
        for lease in state.leases.values() {
            claim(&mut claimed, &lease.diff_ids);
        }
        for pull in state.pulls.values() {
            claim(&mut claimed, pull.layers.iter().map(|l| &l.diff_id));
        }
        let pulled = state.pulls.values().flat_map(|p| &p.layers);
        let ingests: HashSet<String> = pulled.map(|l| files::ingest_name(&l.digest)).collect();

        for path in files::list(&self.files.layers())? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !LayerName::parse(&name).is_some_and(|name| claimed.contains(&name)) {
                files::remove_file(&path)?;
            }
        }
        for path in files::list(&self.files.ingest_dir())? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !ingests.contains(&*name) {
                files::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

impl PullTicket {
    /// Gives up the claim and deletes what the pull has brought.
    pub(crate) fn discard(self) -> Result<(), StoreError> {
        let mut state = self.store.state();
        self.store.end_pull(&mut state, self.id)?;
        self.store.collect_locked(&mut state)
    }
}

impl Drop for PullTicket {
    fn drop(&mut self) {
        self.store.live().remove(&self.id);
    }
}

/// Whoever has these layers, lowest first, has what goes on top of them.
fn claim<'a>(
    claimed: &mut HashSet<LayerName>,
    diff_ids: impl IntoIterator<Item = &'a Digest> + Clone,
) {
    claimed.extend(Digest::chain(diff_ids.clone()).map(LayerName::Directories));
    let layers = diff_ids.into_iter().cloned();
    claimed.extend(layers.map(LayerName::Layer));
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
