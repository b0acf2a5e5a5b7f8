//! Pulling an image: manifest, configuration, layers, what they need on top,
//! and the commit that makes it visible.

mod directories;
mod ingest;
mod layers;

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use futures_util::{StreamExt, stream};

pub(crate) use layers::{Layers, blocking};

use crate::{
    auth::Auth,
    config::ImageServiceConfig,
    digest::Digest,
    error::{Error, ErrorKind, LayerError, StoreError},
    manifest::{self, LayerBlob, MAX_DEPTH, Manifest, ManifestError, Parsed},
    reference::{Reference, Selector},
    registry::{RegistryError, Session},
    store::{
        NewImage, PullTicket, Store,
        record::{LayerRecord, PulledLayer},
    },
};

/// One pull. Dropping its future stops it; what it has fetched is kept.
pub(crate) struct Pull {
    pub(crate) config: Arc<ImageServiceConfig>,
    pub(crate) store: Arc<Store>,
    pub(crate) layers: Arc<Layers>,
    pub(crate) reference: Reference,
    pub(crate) auth: Option<Auth>,
}

/// What a pull has come to.
pub(crate) struct Run {
    /// The image's.
    pub(crate) id: Digest,
    /// Not if the image was up to date.
    pub(crate) fetched: bool,
}

/// An image's documents, verified.
struct Documents {
    /// Of what the reference names: index or manifest.
    top: Digest,
    manifest_text: String,
    manifest: Manifest,
    config_text: String,
    diff_ids: Vec<Digest>,
}

impl Documents {
    /// What of the documents only shows when they are held side by side.
    fn check(
        top: Digest,
        manifest_bytes: Vec<u8>,
        manifest: Manifest,
        config_bytes: Vec<u8>,
    ) -> Result<Self, ManifestError> {
        let (config, diff_ids) = manifest::parse_config(&config_bytes)?;
        manifest::check_platform(&config)?;
        if diff_ids.len() != manifest.layers.len() {
            return Err(ManifestError::Malformed {
                what: "configuration",
                reason: format!(
                    "it describes {} layers and the manifest {}",
                    diff_ids.len(),
                    manifest.layers.len()
                ),
            });
        }
        let text = |what, bytes| {
            String::from_utf8(bytes).map_err(|e| ManifestError::Malformed {
                what,
                reason: e.to_string(),
            })
        };
        Ok(Self {
            top,
            manifest_text: text("manifest", manifest_bytes)?,
            manifest,
            config_text: text("configuration", config_bytes)?,
            diff_ids,
        })
    }
}

impl Pull {
    pub(crate) async fn run(self) -> Result<Run, Error> {
        let begun = Instant::now();
        let credentials = match &self.auth {
            Some(auth) => auth.credentials().map_err(|reason| Error::Credentials {
                image: self.reference.to_string(),
                reason,
            })?,
            None => None,
        };
        let session = {
            let (config, reference) = (Arc::clone(&self.config), self.reference.clone());
            let open = move || Ok(Session::new(&config, &reference, credentials.as_ref()));
            let opened = blocking(open).await?;
            Arc::new(opened.map_err(|e| self.registry_error(e))?)
        };
        if let Some(id) = self.is_current(&session).await {
            tracing::info!(image = %self.reference, %id, "image is up to date");
            return Ok(Run { id, fetched: false });
        }
        let documents = self.documents(&session).await?;
        let id = documents.manifest.config.digest.clone();
        let ticket = self.begin(&documents).await?;
        let fetched = self.fetch_layers(&session, &documents).await;
        match fetched {
            Ok(layers) => {
                self.commit(ticket, documents, layers).await?;
                tracing::info!(image = %self.reference, %id, took = ?begun.elapsed(), "image pulled");
                Ok(Run { id, fetched: true })
            }
            Err(error) => {
                for layer in &documents.manifest.layers {
                    self.layers.settled(&layer.blob.digest).await;
                }
                if !may_go_on(&error) {
                    blocking(move || ticket.discard()).await?;
                }
                Err(error)
            }
        }
    }

    fn registry_error(&self, source: RegistryError) -> Error {
        Error::Registry {
            image: self.reference.to_string(),
            source,
        }
    }

    fn manifest_error(&self, source: ManifestError) -> Error {
        Error::Manifest {
            image: self.reference.to_string(),
            registry: self.reference.registry().to_owned(),
            source,
        }
    }

    fn layer_error(&self, digest: &Digest, error: LayerError) -> Error {
        match error {
            // It names the registry and the blob itself.
            LayerError::Registry(source) => self.registry_error(source),
            LayerError::Stopped => Error::Stopped {
                image: self.reference.to_string(),
            },
            source => Error::Layer {
                image: self.reference.to_string(),
                registry: self.reference.registry().to_owned(),
                digest: digest.clone(),
                source: Box::new(source),
            },
        }
    }

    /// The id of the image that the tag leads to, here and in the registry.
    /// Asks for headers only, which registries do not count as a pull.
    async fn is_current(&self, session: &Session) -> Option<Digest> {
        let tag @ Selector::Tag(_) = self.reference.selector() else {
            return None;
        };
        let image = self.store.find(&self.reference.to_string())?;
        let digest = session.resolve(tag).await?;
        let name = format!("{}@{digest}", self.reference.name());
        image.has_name(&name).then(|| image.record.id.clone())
    }

    async fn documents(&self, session: &Session) -> Result<Documents, Error> {
        let get = async |selector: &Selector| {
            session
                .manifest(selector)
                .await
                .map_err(|e| self.registry_error(e))
        };
        let mut document = get(self.reference.selector()).await?;
        let top = document.digest.clone();
        let mut depth = 0;
        let manifest = loop {
            let parsed = manifest::parse(&document.bytes, &document.content_type)
                .map_err(|e| self.manifest_error(e))?;
            match parsed {
                Parsed::Image(manifest) => break manifest,
                Parsed::Index(_) if depth == MAX_DEPTH => {
                    return Err(self.manifest_error(ManifestError::TooDeep));
                }
                Parsed::Index(digest) => document = get(&Selector::Digest(digest)).await?,
            }
            depth += 1;
        };
        let limit = self.config.max_layer_bytes;
        if let Some(layer) = manifest.layers.iter().find(|l| l.blob.size > limit) {
            return Err(self.manifest_error(ManifestError::TooLarge {
                what: "layer",
                size: layer.blob.size,
                limit,
            }));
        }
        let config = &manifest.config;
        let config_bytes = match self.store.by_id(&config.digest) {
            Some(image) => image.record.config.clone().into_bytes(),
            None => session
                .small_blob(&config.digest, config.size)
                .await
                .map_err(|e| self.registry_error(e))?,
        };
        Documents::check(top, document.bytes, manifest, config_bytes)
            .map_err(|e| self.manifest_error(e))
    }

    async fn begin(&self, documents: &Documents) -> Result<PullTicket, StoreError> {
        let claims = documents
            .manifest
            .layers
            .iter()
            .zip(&documents.diff_ids)
            .map(|(layer, diff_id)| PulledLayer {
                digest: layer.blob.digest.clone(),
                diff_id: diff_id.clone(),
            })
            .collect();
        let (store, reference) = (Arc::clone(&self.store), self.reference.to_string());
        blocking(move || store.begin_pull(&reference, claims)).await
    }

    /// The layers' records, lowest first. After a failure the fetches that
    /// nobody else waits for have been told to stop.
    async fn fetch_layers(
        &self,
        session: &Arc<Session>,
        documents: &Documents,
    ) -> Result<Vec<LayerRecord>, Error> {
        let layers = documents.manifest.layers.iter().zip(&documents.diff_ids);
        let fetches: Vec<_> = layers
            .enumerate()
            .map(|(index, (layer, diff_id))| async move {
                let record = self.fetch_layer(session, layer, diff_id).await;
                record.map(|record| (index, record))
            })
            .collect();
        let parallel = usize::try_from(self.config.parallel_layers).unwrap_or(1);
        let mut fetches = stream::iter(fetches).buffer_unordered(parallel);
        let mut records = BTreeMap::new();
        while let Some(fetched) = fetches.next().await {
            let (index, record) = fetched?;
            records.insert(index, record);
        }
        Ok(records.into_values().collect())
    }

    async fn fetch_layer(
        &self,
        session: &Arc<Session>,
        layer: &LayerBlob,
        diff_id: &Digest,
    ) -> Result<LayerRecord, Error> {
        let digest = &layer.blob.digest;
        let known = {
            let (store, diff_id) = (Arc::clone(&self.store), diff_id.clone());
            blocking(move || store.files().find_layer(&diff_id)).await?
        };
        let len = match known {
            Some(on_disk) => on_disk.len,
            None => {
                let ingested = self
                    .layers
                    .fetch(session, layer)
                    .await
                    .map_err(|e| self.layer_error(digest, e))?;
                if ingested.diff_id != *diff_id {
                    return Err(self.layer_error(
                        digest,
                        LayerError::DiffId {
                            expected: diff_id.clone(),
                            actual: ingested.diff_id,
                        },
                    ));
                }
                ingested.on_disk.len
            }
        };
        Ok(LayerRecord {
            digest: digest.clone(),
            diff_id: diff_id.clone(),
            compressed_len: layer.blob.size,
            len,
        })
    }

    async fn commit(
        &self,
        ticket: PullTicket,
        documents: Documents,
        layers: Vec<LayerRecord>,
    ) -> Result<(), Error> {
        let directories_len = match self.restore_directories(&layers).await {
            Ok(len) => len,
            Err(error) => {
                blocking(move || ticket.discard()).await?;
                return Err(error);
            }
        };
        let mut names = vec![format!("{}@{}", self.reference.name(), documents.top)];
        if matches!(self.reference.selector(), Selector::Tag(_)) {
            names.push(self.reference.to_string());
        }
        let image = NewImage {
            id: documents.manifest.config.digest,
            names,
            manifest: documents.manifest_text,
            config: documents.config_text,
            layers,
            directories_len,
        };
        let store = Arc::clone(&self.store);
        let committed = blocking(move || {
            let committed = store.commit(&ticket, image);
            match committed {
                // Without room for a record there is none for its layers.
                Err(_) => ticket.discard().and(committed),
                Ok(()) => Ok(()),
            }
        });
        Ok(committed.await?)
    }

    /// Length of the layer that goes on top of `layers`, if they need one.
    async fn restore_directories(&self, layers: &[LayerRecord]) -> Result<Option<u64>, Error> {
        let (store, fetched) = (Arc::clone(&self.store), Arc::clone(&self.layers));
        let diff_ids: Vec<Digest> = layers.iter().map(|l| l.diff_id.clone()).collect();
        let work = move || {
            let unpacking = fetched.unpacking();
            Ok(directories::restore(store.files(), unpacking, &diff_ids))
        };
        let restored = blocking(work).await?;
        restored.map_err(|source| Error::Directories {
            image: self.reference.to_string(),
            source: Box::new(source),
        })
    }
}

/// Whether the next pull can use what this one has fetched.
fn may_go_on(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Unavailable
            | ErrorKind::DeadlineExceeded
            | ErrorKind::Unauthorized
            | ErrorKind::NotFound
            | ErrorKind::Cancelled
    )
}
