//! Records in one redb file. Every write is on disk when the call returns.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::record::{ContainerRecord, PodRecord};

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

/// Shared by all drivers; a write runs on the blocking pool.
#[derive(Clone)]
pub struct Store {
    database: Arc<Database>,
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
        let database = Database::create(path).map_err(|e| open(e.into()))?;
        let write = database.begin_write().map_err(|e| open(e.into()))?;
        write.open_table(PODS).map_err(|e| open(e.into()))?;
        write.open_table(CONTAINERS).map_err(|e| open(e.into()))?;
        write.commit().map_err(|e| open(e.into()))?;
        Ok(Self {
            database: Arc::new(database),
        })
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
        let read = self.database.begin_read().map_err(db)?;
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
        let database = Arc::clone(&self.database);
        tokio::task::spawn_blocking(move || {
            let transaction = database.begin_write().map_err(db)?;
            change(&transaction)?;
            transaction.commit().map_err(db)
        })
        .await
        .map_err(|_| StoreError::WriterGone)?
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
        let write = store.database.begin_write().unwrap();
        let mut pods = write.open_table(PODS).unwrap();
        pods.insert("abc", b"{\"from\": \"the future\"}".as_slice())
            .unwrap();
        drop(pods);
        write.commit().unwrap();
        for _ in 0..2 {
            let found = store.load().unwrap();
            assert!(found.pods.is_empty());
            assert_eq!(found.unreadable, ["abc"]);
        }
    }
}
