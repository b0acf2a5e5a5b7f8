//! Records in one redb file. Every write is on disk when the call returns.
//!
//! A full disk is no end: the file's blocks are taken in advance, so that what
//! is there can still be changed and removed, and a database that had an I/O
//! error is opened anew by the next call.

mod file;

use std::fs::{File, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::config::UIDS;
use crate::faults;
use crate::record::{ContainerRecord, PodPhase, PodRecord};
use file::ReservedFile;

const PODS: TableDefinition<&str, &[u8]> = TableDefinition::new("pods");
const CONTAINERS: TableDefinition<&str, &[u8]> = TableDefinition::new("containers");
/// What is neither a pod's nor a container's.
const NODE: TableDefinition<&str, u32> = TableDefinition::new("node");
/// In [`NODE`]: the uid that was given to a pod last.
const LAST_UID: &str = "last-uid";

/// Of the file: containers' environments are in it, and so what is secret.
const MODE: u32 = 0o600;

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
        .mode(MODE)
        .open(path)?;
    // One that an earlier version made is readable by everyone.
    file.set_permissions(Permissions::from_mode(MODE))?;
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
    /// The uid that was given to a pod last, if any was.
    pub last_uid: Option<u32>,
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
        write.open_table(NODE).map_err(|e| open(e.into()))?;
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

    /// With the first record of a pod goes its uid, which no other pod is to
    /// have soon.
    pub async fn put_pod(&self, record: &PodRecord) -> Result<(), StoreError> {
        let given = (record.phase == PodPhase::Reserved).then_some(record.uid);
        self.put(PODS, &record.id, record, given).await
    }

    pub async fn put_container(&self, record: &ContainerRecord) -> Result<(), StoreError> {
        self.put(CONTAINERS, &record.id, record, None).await
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
        let node = read.open_table(NODE).map_err(db)?;
        let last_uid = node.get(LAST_UID).map_err(db)?;
        Ok(Found {
            last_uid: last_uid.map(|uid| uid.value()),
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
        given_uid: Option<u32>,
    ) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record).map_err(|source| StoreError::Encode {
            id: id.to_owned(),
            source,
        })?;
        let id = id.to_owned();
        self.write(move |transaction| {
            let mut table = transaction.open_table(table).map_err(db)?;
            table.insert(id.as_str(), bytes.as_slice()).map_err(db)?;
            given_uid.map_or(Ok(()), |uid| note_uid(transaction, uid))
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

/// Records of pods that start at once come in any order.
fn note_uid(transaction: &redb::WriteTransaction, uid: u32) -> Result<(), StoreError> {
    let mut node = transaction.open_table(NODE).map_err(db)?;
    let last = node.get(LAST_UID).map_err(db)?.map(|last| last.value());
    if last.is_none_or(|last| comes_after(uid, last)) {
        node.insert(LAST_UID, uid).map_err(db)?;
    }
    Ok(())
}

/// Whether `uid` was given after `last`: they go round a circle of [`UIDS`],
/// or begin anew where the configuration has another.
fn comes_after(uid: u32, last: u32) -> bool {
    let ahead = uid.wrapping_sub(last) % UIDS;
    uid.abs_diff(last) >= UIDS || (1..UIDS / 2).contains(&ahead)
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

    #[tokio::test]
    async fn the_last_uid_is_the_one_furthest_round_whatever_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let store = Store::open(&path).unwrap();
        assert_eq!(store.load().unwrap().last_uid, None);
        let text = serde_json::Value::from("a pod");
        let base = 1_879_048_192;
        let last = UIDS - 1;
        for (given, noted) in [
            (base, base),
            (base + 2, base + 2),
            (base + 1, base + 2),
            (base + UIDS / 2, base + UIDS / 2),
            (base + last, base + last),
            // Round the circle, and one that comes late.
            (base, base),
            (base + last - 3, base),
            // Another circle.
            (70_000, 70_000),
            (base, base),
        ] {
            store.put(PODS, "a", &text, Some(given)).await.unwrap();
            assert_eq!(store.load().unwrap().last_uid, Some(noted), "{given}");
        }
        drop(store);
        let store = Store::open(&path).unwrap();
        assert_eq!(store.load().unwrap().last_uid, Some(base));
    }

    #[test]
    fn nobody_else_reads_the_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let mode = || path.metadata().unwrap().permissions().mode() & 0o777;
        drop(Store::open(&path).unwrap());
        assert_eq!(mode(), 0o600);
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        drop(Store::open(&path).unwrap());
        assert_eq!(mode(), 0o600);
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
        store.put(PODS, "old", &record(2000), None).await.unwrap();

        let filler = disk.0.path().join("filler");
        std::fs::write(&filler, vec![1; 64 << 20]).unwrap_err();
        store.put(PODS, "old", &record(1000), None).await.unwrap();
        for _ in 0..2 {
            let put = store.put(PODS, "new", &record(3 << 20), None).await;
            let error = put.unwrap_err();
            assert!(error.is_full(), "{error:?}");
        }
        store.delete_pod("old").await.unwrap();

        std::fs::remove_file(&filler).unwrap();
        store
            .put(PODS, "new", &record(3 << 20), None)
            .await
            .unwrap();
        drop(store);
        let store = Store::open(&disk.0.path().join("state.redb")).unwrap();
        assert_eq!(store.load().unwrap().unreadable, ["new"]);
    }
}
