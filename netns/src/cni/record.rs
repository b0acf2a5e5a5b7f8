//! The attachments that exist or may exist, one file each.
//!
//! A record is on disk before the first plugin's ADD runs and goes when the
//! last plugin's DEL has succeeded. It holds all that DEL takes, so that an
//! attachment can be undone when the daemon was killed in the midst, and when
//! the network's configuration has changed or gone.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::task::spawn_blocking;

use super::{config::NetworkList, error::CniError};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) network: NetworkList,
    pub(crate) sandbox_id: String,
    pub(crate) interface: String,
    pub(crate) netns: PathBuf,
    pub(crate) args: String,
    pub(crate) capabilities: Map<String, Value>,
    /// Of the last plugin whose ADD succeeded.
    pub(crate) result: Option<Value>,
    /// All ADDs have succeeded: `result` is the attachment's.
    pub(crate) complete: bool,
    /// Plugins, by their place in the chain, whose CHECK has succeeded once.
    #[serde(default)]
    pub(crate) approved: BTreeSet<usize>,
}

/// An attachment that has a record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    pub sandbox_id: String,
    pub interface: String,
}

/// Extensions of records' files.
const WHOLE: &str = "json";
const UNFINISHED: &str = "new";

/// The directory of records.
#[derive(Clone, Debug)]
pub(crate) struct Records {
    pub(crate) dir: PathBuf,
}

impl Records {
    /// Writes a record so that it outlives a crash of the machine: addresses
    /// that plugins keep on disk do so, too.
    pub(crate) async fn insert(&self, record: &Record) -> Result<(), CniError> {
        self.write(record, true).await
    }

    /// Writes a record's new state. After a crash of the machine the old one
    /// is as good: the links that the result is about are gone.
    pub(crate) async fn update(&self, record: &Record) -> Result<(), CniError> {
        self.write(record, false).await
    }

    async fn write(&self, record: &Record, durable: bool) -> Result<(), CniError> {
        let path = self.path(record);
        let temporary = temporary_of(&path);
        let dir = self.dir.clone();
        let bytes = serde_json::to_vec(record).map_err(|source| CniError::DamagedRecord {
            path: path.clone(),
            source,
        })?;
        let failed = failure("write", &path);
        blocking(move || {
            fs::create_dir_all(&dir)?;
            let mut file = File::create(&temporary)?;
            file.write_all(&bytes)?;
            if durable {
                file.sync_all()?;
            }
            fs::rename(&temporary, &path)?;
            if durable {
                File::open(&dir)?.sync_all()?;
            }
            Ok(())
        })
        .await
        .map_err(failed)
    }

    pub(crate) async fn remove(&self, record: &Record) -> Result<(), CniError> {
        let path = self.path(record);
        let failed = failure("remove", &path);
        blocking(move || {
            remove_if_there(&temporary_of(&path))?;
            remove_if_there(&path)
        })
        .await
        .map_err(failed)
    }

    /// Removes what writes that a killed daemon had begun have left. Not to be
    /// called while something is written.
    pub(crate) async fn remove_unfinished(&self) -> Result<(), CniError> {
        let failed = failure("remove unfinished ones beside", &self.dir);
        let paths = self.files(UNFINISHED).await?;
        blocking(move || paths.iter().try_for_each(|path| remove_if_there(path)))
            .await
            .map_err(failed)
    }

    pub(crate) async fn find(
        &self,
        sandbox_id: &str,
        interface: &str,
    ) -> Result<Option<Record>, CniError> {
        let suffix = format!("-{sandbox_id}-{interface}.json");
        for path in self.files(WHOLE).await? {
            let name = path.file_name().and_then(|name| name.to_str());
            if !name.is_some_and(|name| name.ends_with(&suffix)) {
                continue;
            }
            // Names may contain '-' themselves: the content decides.
            if let Some(record) = read(path).await?
                && record.sandbox_id == sandbox_id
                && record.interface == interface
            {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    pub(crate) async fn all(&self) -> Result<Vec<Record>, CniError> {
        let mut records = Vec::new();
        for path in self.files(WHOLE).await? {
            records.extend(read(path).await?);
        }
        Ok(records)
    }

    /// Those whose names end with `extension`.
    async fn files(&self, extension: &'static str) -> Result<Vec<PathBuf>, CniError> {
        let dir = self.dir.clone();
        let failed = failure("list", &dir);
        blocking(move || {
            let entries = match fs::read_dir(&dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries?,
            };
            let mut paths = Vec::new();
            for entry in entries {
                let path = entry?.path();
                if path.extension().is_some_and(|of_path| of_path == extension) {
                    paths.push(path);
                }
            }
            paths.sort();
            Ok(paths)
        })
        .await
        .map_err(failed)
    }

    fn path(&self, record: &Record) -> PathBuf {
        self.dir.join(format!(
            "{}-{}-{}.json",
            record.network.name, record.sandbox_id, record.interface
        ))
    }
}

/// None when it went since it was listed.
async fn read(path: PathBuf) -> Result<Option<Record>, CniError> {
    let failed = failure("read", &path);
    let bytes = {
        let path = path.clone();
        blocking(move || match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            bytes => bytes.map(Some),
        })
        .await
        .map_err(failed)?
    };
    let Some(bytes) = bytes else { return Ok(None) };
    match serde_json::from_slice(&bytes) {
        Ok(record) => Ok(Some(record)),
        Err(source) => Err(CniError::DamagedRecord { path, source }),
    }
}

/// Not `*.json`: an interrupted write is no record.
fn temporary_of(path: &Path) -> PathBuf {
    path.with_extension(format!("{WHOLE}.{UNFINISHED}"))
}

pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

pub(crate) fn failure(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> CniError + use<> {
    let path = path.to_owned();
    move |source| CniError::Record {
        action,
        path,
        source,
    }
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(network: &str, sandbox: &str) -> Record {
        let text = format!(r#"{{"cniVersion": "1.0.0", "name": "{network}", "type": "bridge"}}"#);
        Record {
            network: NetworkList::parse(Path::new("n.conf"), text.as_bytes()).unwrap(),
            sandbox_id: sandbox.to_owned(),
            interface: "eth0".to_owned(),
            netns: "/run/netns/x".into(),
            args: String::new(),
            capabilities: Map::new(),
            result: None,
            complete: false,
            approved: BTreeSet::new(),
        }
    }

    #[tokio::test]
    async fn a_record_is_found_by_pod_and_not_by_a_name_that_looks_alike() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records {
            dir: dir.path().join("cache"),
        };
        assert_eq!(records.find("b", "eth0").await.unwrap(), None);
        assert!(records.all().await.unwrap().is_empty());

        let mut ours = record("net", "a-b");
        records.insert(&ours).await.unwrap();
        assert_eq!(records.find("b", "eth0").await.unwrap(), None);
        assert_eq!(records.find("a-b", "eth1").await.unwrap(), None);
        ours.complete = true;
        records.update(&ours).await.unwrap();
        assert_eq!(
            records.find("a-b", "eth0").await.unwrap(),
            Some(ours.clone())
        );

        records.remove(&ours).await.unwrap();
        records.remove(&ours).await.unwrap();
        assert_eq!(fs::read_dir(&records.dir).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_damaged_record_is_named_and_an_interrupted_write_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records {
            dir: dir.path().to_owned(),
        };
        fs::write(dir.path().join("net-x-eth0.json.new"), "{").unwrap();
        assert!(records.all().await.unwrap().is_empty());
        records.remove_unfinished().await.unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        fs::write(dir.path().join("net-x-eth0.json"), "{").unwrap();
        let error = records.find("x", "eth0").await.unwrap_err();
        assert!(error.to_string().contains("net-x-eth0.json"), "{error}");
    }
}
