//! Fetching one layer, for every pull that wants it at the time.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use unpacker_client::{Failure, stopper};

use super::ingest::{Feed, Ingested, Told, ingest};
use crate::{
    digest::Digest,
    error::{ErrorKind, LayerError, StoreError},
    flight::Flights,
    manifest::LayerBlob,
    observer::Observer,
    registry::Session,
    store::{Files, Store, remove_file},
    unpack::Unpacking,
};

/// Pieces from the network that wait for the disk. Each is some 100 KiB.
const FEED: usize = 16;

/// How often a pull waits for what another pull began before it fails for its
/// own reasons.
const JOINS: u32 = 8;

pub(crate) struct Layers {
    store: Arc<Store>,
    unpacking: Unpacking,
    flights: Flights<Digest, Result<Ingested, LayerError>>,
    observer: Arc<dyn Observer>,
}

impl Layers {
    pub(crate) fn new(
        store: Arc<Store>,
        unpacking: Unpacking,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self {
            store,
            unpacking,
            flights: Flights::new(),
            observer,
        }
    }

    pub(super) fn unpacking(&self) -> &Unpacking {
        &self.unpacking
    }

    /// The layer's file, fetched over `session` if nobody else is at it.
    pub(super) async fn fetch(
        &self,
        session: &Arc<Session>,
        layer: &LayerBlob,
    ) -> Result<Ingested, LayerError> {
        let mut joins = 0;
        loop {
            let work = |cancel| {
                run(
                    Arc::clone(&self.store),
                    self.unpacking.clone(),
                    Arc::clone(session),
                    layer.clone(),
                    Arc::clone(&self.observer),
                    cancel,
                )
            };
            let landed = self
                .flights
                .join(layer.blob.digest.clone(), work)
                .await
                .ok_or(StoreError::Task)?;
            joins += 1;
            match landed.value {
                // Another pull's registry or credentials may be at fault.
                Err(error) if !landed.own && joins < JOINS => {
                    tracing::debug!(%error, layer = %layer.blob.digest, "another pull's failure");
                }
                value => return value,
            }
        }
    }

    /// Returns once nothing that was told to stop is at the layer.
    pub(super) async fn settled(&self, digest: &Digest) {
        self.flights.settled(digest).await;
    }
}

/// Stops soon after `cancel`, and not before its thread has ended.
async fn run(
    store: Arc<Store>,
    unpacking: Unpacking,
    session: Arc<Session>,
    layer: LayerBlob,
    observer: Arc<dyn Observer>,
    cancel: CancellationToken,
) -> Result<Ingested, LayerError> {
    let mut error = LayerError::Stopped;
    // A file from before may be damaged: then once more from the start.
    for _ in 0..2 {
        let files = store.files();
        let (result, resumed) =
            attempt(files, &unpacking, &session, &layer, &observer, &cancel).await;
        error = match result {
            Ok(ingested) => return Ok(ingested),
            Err(error) => error,
        };
        if error.is_transient() {
            return Err(error);
        }
        let path = store.files().ingest(&layer.blob.digest);
        blocking(move || remove_file(&path)).await?;
        let damaged = match error {
            LayerError::Digest { .. } => true,
            LayerError::Content { kind, .. } => kind != ErrorKind::Unconfined,
            _ => false,
        };
        if !(resumed && damaged) {
            return Err(error);
        }
        tracing::info!(layer = %layer.blob.digest, %error, "partial download dropped");
    }
    Err(error)
}

/// The second value: whether bytes from before were used.
async fn attempt(
    files: &Files,
    unpacking: &Unpacking,
    session: &Session,
    layer: &LayerBlob,
    observer: &Arc<dyn Observer>,
    cancel: &CancellationToken,
) -> (Result<Ingested, LayerError>, bool) {
    let (sink, pieces) = mpsc::channel(FEED);
    let feed = Feed {
        pieces,
        observer: Arc::clone(observer),
    };
    let (start, started) = oneshot::channel();
    let (enough, is_enough) = oneshot::channel();
    let told = Told { start, enough };
    let (stopper, stop) = match stopper() {
        Ok(pair) => pair,
        Err(error) => return (Err(Failure::Pipe(error).into()), false),
    };
    let thread = {
        let (files, layer, unpacking) = (files.clone(), layer.clone(), unpacking.clone());
        tokio::task::spawn_blocking(move || ingest(&files, &layer, &unpacking, told, feed, &stop))
    };
    let mut resumed = false;
    let download = async {
        // Without an offset the thread has failed and says why.
        let Ok(offset) = started.await else {
            return Ok(());
        };
        resumed = offset > 0;
        let blob = &layer.blob;
        session
            .deliver(&blob.digest, blob.size, offset, &sink)
            .await
            .map(|_| ())
    };
    let download = tokio::select! {
        result = download => result.map_err(LayerError::from),
        () = cancel.cancelled() => Err(LayerError::Stopped),
        // The thread has all it needs, or has failed and says why.
        _ = is_enough => Ok(()),
    };
    // It is told to stop before its feed ends: an end alone is what unpackers
    // take for a layer that is cut.
    let stopper = download.is_ok().then_some(stopper);
    drop(sink);
    let ingested = match thread.await {
        Ok(result) => result,
        Err(_) => Err(StoreError::Task.into()),
    };
    drop(stopper);
    let result = match (ingested, download) {
        (Err(LayerError::Stopped), Err(error)) => Err(error),
        (ingested, _) => ingested,
    };
    (result, resumed)
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(StoreError::Task),
    }
}
