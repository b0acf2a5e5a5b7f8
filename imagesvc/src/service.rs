//! The image service: what the CRI image API and the pod driver call.

use std::{
    collections::HashSet,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio_util::sync::CancellationToken;
use unpacker_client::{Limits, Unpacker};

use crate::{
    auth::Auth,
    config::ImageServiceConfig,
    digest::Digest,
    error::{Error, StoreError},
    flight::Flights,
    image::{FsInfo, Image, LayerFile, Lease},
    observer::{Observer, PullOutcome},
    private_cache,
    pull::{Layers, Pull, Run, blocking},
    reference::Reference,
    store::{Store, record::Stored},
    unpack::Unpacking,
};

/// A pull's identity: other credentials are another pull, since they may be
/// refused.
type PullKey = (Reference, Option<Auth>);

/// Cheap to clone; all clones are one service.
#[derive(Clone)]
pub struct ImageService {
    inner: Arc<Inner>,
}

struct Inner {
    config: Arc<ImageServiceConfig>,
    /// Normalised.
    pinned: HashSet<String>,
    store: Arc<Store>,
    layers: Arc<Layers>,
    pulls: Flights<PullKey, Result<Digest, Error>>,
    observer: Arc<dyn Observer>,
}

/// An image that is here whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulledImage {
    pub id: String,
}

impl ImageService {
    /// Opens the store below `root`, which no other process may use, and
    /// clears up what a crash left. Layers will be unpacked by `unpacker`,
    /// which takes root's rights to start.
    ///
    /// # Errors
    /// An invalid configuration; a root that is in use or cannot be written.
    pub async fn open(
        config: ImageServiceConfig,
        root: &Path,
        unpacker: Unpacker,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, Error> {
        let root = root.to_owned();
        let limits = Limits {
            max_uncompressed_bytes: config.max_layer_bytes,
            max_entries: config.max_layer_entries,
            max_ratio: config.max_layer_ratio,
            ..Limits::default()
        };
        let pinned = config
            .pinned
            .iter()
            .map(|name| Ok(name.parse::<Reference>()?.to_string()))
            .collect::<Result<_, Error>>()?;
        let (config, store) = blocking(move || {
            let valid = config.validate();
            Ok(match valid {
                Ok(()) => Ok((config, Store::open(&root)?)),
                Err(error) => Err(error),
            })
        })
        .await??;
        let layers = Arc::new(Layers::new(
            Arc::clone(&store),
            Unpacking { unpacker, limits },
            Arc::clone(&observer),
        ));
        Ok(Self {
            inner: Arc::new(Inner {
                config: Arc::new(config),
                pinned,
                store,
                layers,
                pulls: Flights::new(),
                observer,
            }),
        })
    }

    /// Makes `reference` available on this node. Several calls for one image
    /// share the work; it stops when the last of their futures is dropped, and
    /// the next pull goes on where it was.
    ///
    /// # Errors
    /// See [`Error`]; after a failure the image is not visible. What was
    /// fetched is kept only if another try can use it.
    pub async fn pull(&self, reference: &str, auth: Option<Auth>) -> Result<PulledImage, Error> {
        let reference: Reference = reference.parse()?;
        let inner = &self.inner;
        let pull = Pull {
            config: Arc::clone(&inner.config),
            store: Arc::clone(&inner.store),
            layers: Arc::clone(&inner.layers),
            reference: reference.clone(),
            auth: auth.clone(),
        };
        let image = reference.to_string();
        let observer = Arc::clone(&inner.observer);
        let work = |cancel: CancellationToken| async move {
            let result = tokio::select! {
                result = pull.run() => result,
                () = cancel.cancelled() => Err(Error::Stopped { image }),
            };
            observer.pull_ended(match &result {
                Ok(Run { fetched: true, .. }) => PullOutcome::Pulled,
                Ok(Run { fetched: false, .. }) => PullOutcome::UpToDate,
                Err(error) => PullOutcome::Failed(error.kind()),
            });
            result.map(|run| run.id)
        };
        let landed = inner.pulls.join((reference, auth), work).await;
        let id = landed.ok_or(StoreError::Task)?.value?;
        Ok(PulledImage { id: id.to_string() })
    }

    /// All images, or the one that `filter` names; see [`Self::status`].
    #[must_use]
    pub fn list(&self, filter: Option<&str>) -> Vec<Image> {
        match filter {
            Some(query) => self.status(query).into_iter().collect(),
            None => {
                let images = self.inner.store.images();
                images.values().map(|stored| self.image(stored)).collect()
            }
        }
    }

    /// The image by name (tag `latest`), `name:tag`, `name@digest`, id with or
    /// without `sha256:`, or an unambiguous beginning of the id of at least 12
    /// digits.
    #[must_use]
    pub fn status(&self, ref_or_id: &str) -> Option<Image> {
        let stored = self.inner.store.find(ref_or_id)?;
        Some(self.image(&stored))
    }

    fn image(&self, stored: &Stored) -> Image {
        Image::new(stored, |name| self.inner.pinned.contains(name))
    }

    /// Removes a name, and with its last tag the image; by id, the image with
    /// all its names. Layers go with their last user: an image, a lease or a
    /// pull under way. What is not there is no error.
    ///
    /// # Errors
    /// Only of the disk.
    pub async fn remove(&self, ref_or_id: &str) -> Result<(), Error> {
        let (store, query) = (Arc::clone(&self.inner.store), ref_or_id.to_owned());
        Ok(blocking(move || store.remove(&query)).await?)
    }

    /// What all of the store takes on disk, partial downloads included.
    ///
    /// # Errors
    /// Only of the disk.
    pub async fn fs_info(&self) -> Result<FsInfo, Error> {
        let store = Arc::clone(&self.inner.store);
        let info = blocking(move || {
            let (used_bytes, inodes_used) = store.files().usage()?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            Ok(FsInfo {
                mountpoint: store.files().root().to_owned(),
                used_bytes,
                inodes_used,
                timestamp_unix_nanos: now.map_or(0, |since| {
                    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
                }),
            })
        });
        Ok(info.await?)
    }

    /// Keeps an image's layers on disk for `owner` (any text), across restarts
    /// and the image's removal, until [`Self::release`]. An owner has one
    /// lease: a second one takes the place of the first.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`]; else only of the disk.
    pub async fn lease(&self, ref_or_id: &str, owner: &str) -> Result<Lease, Error> {
        let store = Arc::clone(&self.inner.store);
        let (query, owner) = (ref_or_id.to_owned(), owner.to_owned());
        let leased = blocking(move || store.lease(&query, &owner)).await?;
        let leased = leased.ok_or_else(|| Error::NoSuchImage {
            image: ref_or_id.to_owned(),
        })?;
        Ok(Lease::new(self.image(&leased.image), leased.layers))
    }

    /// Opens the files of leased layers for one container, in their order. With
    /// `private_cache` each is a clone of its own.
    ///
    /// # Errors
    /// [`Error::PrivateCache`]; else only of the disk.
    pub async fn open_layers(&self, layers: &[LayerFile]) -> Result<Vec<File>, Error> {
        let is_private = self.inner.config.private_cache;
        let paths: Vec<_> = layers.iter().map(|layer| layer.path.clone()).collect();
        let opened = blocking(move || {
            let open = |path: PathBuf| match is_private {
                false => File::open(&path).map_err(|e| Error::from(StoreError::io(path, e))),
                true => private_cache::open_alone(&path).map_err(|source| Error::PrivateCache {
                    path,
                    source: Arc::new(source),
                }),
            };
            Ok(paths.into_iter().map(open).collect())
        });
        opened.await?
    }

    /// Ends the lease of `owner`; one that is not there is no error.
    ///
    /// # Errors
    /// Only of the disk.
    pub async fn release(&self, owner: &str) -> Result<(), Error> {
        let (store, owner) = (Arc::clone(&self.inner.store), owner.to_owned());
        Ok(blocking(move || store.release(&owner)).await?)
    }

    /// Every lease: owner and image id.
    #[must_use]
    pub fn leases(&self) -> Vec<(String, String)> {
        let leases = self.inner.store.leases().into_iter();
        leases.map(|(owner, id)| (owner, id.to_string())).collect()
    }
}
