//! Records in one redb file. Every write is on disk when the call returns.
//!
//! A full disk is no end: the file's blocks are taken in advance, so that what
//! is there can still be changed and removed, and a database that had an I/O
//! error is opened anew by the next call.

mod file;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::faults;
use crate::record::{ContainerRecord, PodRecord};
use file::ReservedFile;

const PODS: TableDefinition<&str, &[u8]> = TableDefinition::new("pods");
const CONTAINERS: TableDefinition<&str, &[u8]> = TableDefinition::new("containers");

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot open {path:?}")]
    Open {
        path: PathBuf,
        #[source]
        source: Box<redb::Error>,
    },
    #[error("transaction failed")]
    Transaction(#[source] Box<redb::Error>),
    #[error("record {id} cannot be encoded: {source}")]
    Encode {
        id: String,
        source: serde_json::Error,
    },
    #[error("the writer task ended")]
    WriterGone,
}

impl StoreError {
    /// Whether the disk has no room left.
    pub fn is_full(&self) -> bool {
        let (Self::Open { source, .. } | Self::Transaction(source)) = self else {
            return false;
        };
        matches!(source.as_ref(), redb::Error::Io(error) if error.kind() == std::io::ErrorKind::StorageFull)
    }
}

fn db(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Transaction(Box::new(error.into()))
}

/// Shared by all drivers; a write runs on the blocking pool. redb has one
/// writer at a time anyway.
#[derive(Clone)]
pub struct Store {
    path: Arc<Path>,
    /// None after an I/O error, which redb does not go on after.
    open: Arc<Mutex<Option<Database>>>,
    writes: Arc<AtomicU64>,
}

/// Takes the database's file, made where there is none.
fn open_database(path: &Path) -> Result<Database, redb::Error> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    // redb does not wait, and tells of a file that another process has.
    imagesvc::lock(&file)?;
    let file = ReservedFile::new(file)?;
    Ok(Database::builder().create_with_backend(file)?)
}

/// What the daemon finds when it starts.
pub struct Found {
    pub pods: Vec<PodRecord>,
    pub containers: Vec<ContainerRecord>,
    /// Ids whose records this version cannot read, after a downgrade perhaps.
    /// They are kept, and so is what they stand for.
    pub unreadable: Vec<String>,
}

impl Store {
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let open = |source: redb::Error| StoreError::Open {
            path: path.to_owned(),
            source: Box::new(source),
        };
        let database = open_database(path).map_err(open)?;
        let write = database.begin_write().map_err(|e| open(e.into()))?;
        write.open_table(PODS).map_err(|e| open(e.into()))?;
        write.open_table(CONTAINERS).map_err(|e| open(e.into()))?;
        write.commit().map_err(|e| open(e.into()))?;
        Ok(Self {
            path: path.into(),
            open: Arc::new(Mutex::new(Some(database))),
            writes: Arc::default(),
        })
    }

    /// How often something was written.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    pub async fn put_pod(&self, record: &PodRecord) -> Result<(), StoreError> {
        self.put(PODS, &record.id, record).await
    }

    pub async fn put_container(&self, record: &ContainerRecord) -> Result<(), StoreError> {
        self.put(CONTAINERS, &record.id, record).await
    }

    pub async fn delete_pod(&self, id: &str) -> Result<(), StoreError> {
        self.delete(PODS, id).await
    }

    pub async fn delete_container(&self, id: &str) -> Result<(), StoreError> {
        self.delete(CONTAINERS, id).await
    }

    pub fn load(&self) -> Result<Found, StoreError> {
        let mut open = self.lock();
        let read = self.ready(&mut open)?.begin_read().map_err(db)?;
        let mut unreadable = Vec::new();
        Ok(Found {
            pods: all(&read, PODS, &mut unreadable)?,
            containers: all(&read, CONTAINERS, &mut unreadable)?,
            unreadable,
        })
    }

    async fn put(
        &self,
        table: TableDefinition<'static, &'static str, &'static [u8]>,
        id: &str,
        record: &impl serde::Serialize,
    ) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record).map_err(|source| StoreError::Encode {
            id: id.to_owned(),
            source,
        })?;
        let id = id.to_owned();
        self.write(move |transaction| {
            let mut table = transaction.open_table(table).map_err(db)?;
            table.insert(id.as_str(), bytes.as_slice()).map_err(db)?;
            Ok(())
        })
        .await
    }

    async fn delete(
        &self,
        table: TableDefinition<'static, &'static str, &'static [u8]>,
        id: &str,
    ) -> Result<(), StoreError> {
        let id = id.to_owned();
        self.write(move |transaction| {
            let mut table = transaction.open_table(table).map_err(db)?;
            table.remove(id.as_str()).map_err(db)?;
            Ok(())
        })
        .await
    }

    async fn write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<(), StoreError> + Send + 'static,
    ) -> Result<(), StoreError> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        let store = self.clone();
        faults::spawn_blocking(move || {
            let mut open = store.lock();
            let database = store.ready(&mut open)?;
            let written = (|| {
                let transaction = database.begin_write().map_err(db)?;
                change(&transaction)?;
                transaction.commit().map_err(db)
            })();
            if let Err(StoreError::Transaction(source)) = &written
                && matches!(
                    source.as_ref(),
                    redb::Error::Io(_) | redb::Error::PreviousIo
                )
            {
                *open = None;
            }
            written
        })
        .await
        .map_err(|_| StoreError::WriterGone)?
    }

    fn lock(&self) -> MutexGuard<'_, Option<Database>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ready<'a>(&self, open: &'a mut Option<Database>) -> Result<&'a Database, StoreError> {
        let opened = match open.take() {
            Some(opened) => opened,
            None => open_database(&self.path).map_err(|source| StoreError::Open {
                path: self.path.to_path_buf(),
                source: Box::new(source),
            })?,
        };
        Ok(open.insert(opened))
    }
}

/// One record that cannot be read must not keep the node from serving all
/// others, nor may it be thrown away: a machine may still run for it.
fn all<T: serde::de::DeserializeOwned>(
    read: &redb::ReadTransaction,
    table: TableDefinition<&'static str, &'static [u8]>,
    unreadable: &mut Vec<String>,
) -> Result<Vec<T>, StoreError> {
    let rows = read.open_table(table).map_err(db)?;
    let mut records = Vec::new();
    for entry in rows.iter().map_err(db)? {
        let (id, bytes) = entry.map_err(db)?;
        match serde_json::from_slice(bytes.value()) {
            Ok(record) => records.push(record),
            Err(error) => {
                let (table, id) = (redb::TableHandle::name(&table), id.value());
                tracing::error!(
                    table, id, %error,
                    "this record cannot be read; what it stands for is left alone until a version that wrote it runs again"
                );
                unreadable.push(id.to_owned());
            }
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_another_version_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("state.redb")).unwrap();
        let open = store.lock();
        let write = open.as_ref().unwrap().begin_write().unwrap();
        let mut pods = write.open_table(PODS).unwrap();
        pods.insert("abc", b"{\"from\": \"the future\"}".as_slice())
            .unwrap();
        drop(pods);
        write.commit().unwrap();
        drop(open);
        for _ in 0..2 {
            let found = store.load().unwrap();
            assert!(found.pods.is_empty());
            assert_eq!(found.unreadable, ["abc"]);
        }
    }

    /// A file system of its own, unmounted when dropped.
    struct SmallDisk(tempfile::TempDir);

    impl SmallDisk {
        fn new(size: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (kind, flags) = (Some("tmpfs"), nix::mount::MsFlags::empty());
            nix::mount::mount(kind, dir.path(), kind, flags, Some(size)).unwrap();
            Self(dir)
        }
    }

    impl Drop for SmallDisk {
        fn drop(&mut self) {
            nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    }

    #[tokio::test]
    async fn on_a_full_disk_records_can_be_removed_and_later_made_again() {
        let disk = SmallDisk::new("size=32m");
        let store = Store::open(&disk.0.path().join("state.redb")).unwrap();
        let record = |length: usize| serde_json::Value::from("x".repeat(length));
        store.put(PODS, "old", &record(2000)).await.unwrap();

        let filler = disk.0.path().join("filler");
        std::fs::write(&filler, vec![1; 64 << 20]).unwrap_err();
        store.put(PODS, "old", &record(1000)).await.unwrap();
        for _ in 0..2 {
            let error = store.put(PODS, "new", &record(3 << 20)).await.unwrap_err();
            assert!(error.is_full(), "{error:?}");
        }
        store.delete_pod("old").await.unwrap();

        std::fs::remove_file(&filler).unwrap();
        store.put(PODS, "new", &record(3 << 20)).await.unwrap();
        drop(store);
        let store = Store::open(&disk.0.path().join("state.redb")).unwrap();
        assert_eq!(store.load().unwrap().unreadable, ["new"]);
    }
}
