//! What pods on the host's kernel have written and is to go. A container may
//! have written a million files: its directory is moved aside at once, which
//! frees its name, and deleted in the background.
//!
//! [`discard`] moves, [`empty`] deletes what was moved, a predecessor's too: the
//! manager begins with that.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::sync::Mutex;

use crate::{Error, Result, ids};

/// One deletes at a time; who comes later finds nothing left.
static TURN: Mutex<()> = Mutex::const_new(());

/// Moves the directory into `trash`, which is on the same file system. One
/// that is gone is no error. On a full disk, where not even a name may have
/// room, it is deleted in its place.
pub fn discard(trash: &Path, dir: &Path) -> Result<()> {
    match move_into(trash, dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::StorageFull => fs::remove_dir_all(dir),
        moved => moved,
    }
    .map_err(|source| failed(dir, source))
}

fn move_into(trash: &Path, dir: &Path) -> io::Result<()> {
    fs::symlink_metadata(dir)?;
    fs::create_dir_all(trash)?;
    fs::rename(dir, trash.join(ids::new_id()))
}

/// Deletes what is in `trash`, in the background; what resists stays for the
/// next time.
pub fn empty(trash: &Path) {
    let trash = trash.to_owned();
    tokio::spawn(async move {
        let _turn = TURN.lock().await;
        let emptied = tokio::task::spawn_blocking(move || delete_all(&trash)).await;
        if let Err(error) = emptied {
            tracing::error!(%error, "cannot delete what pods have written");
        }
    });
}

fn delete_all(trash: &Path) {
    let entries = match fs::read_dir(trash) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        entries => entries,
    };
    let paths = entries.and_then(|entries| {
        let paths = entries.map(|entry| Ok(entry?.path()));
        paths.collect::<io::Result<Vec<PathBuf>>>()
    });
    let paths = paths.unwrap_or_else(|error| {
        tracing::error!(?trash, %error, "cannot read what is to be deleted");
        Vec::new()
    });
    for path in paths {
        // Symbolic links are not followed, whoever changes the tree meanwhile.
        if let Err(error) = fs::remove_dir_all(&path) {
            tracing::warn!(?path, %error, "cannot delete what a pod has written yet");
        }
    }
}

fn failed(path: &Path, source: io::Error) -> Error {
    Error::File {
        what: "written files",
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn what_is_discarded_is_gone_at_once_and_deleted_later() {
        let dir = tempfile::tempdir().unwrap();
        let (trash, layer) = (dir.path().join("trash"), dir.path().join("layer"));
        fs::create_dir_all(layer.join("a/b")).unwrap();
        fs::write(layer.join("a/b/file"), "x").unwrap();
        discard(&trash, &layer).unwrap();
        assert!(!layer.exists());
        // The name is free, and what is not there is no error.
        fs::create_dir(&layer).unwrap();
        discard(&trash, &layer).unwrap();
        discard(&trash, &layer).unwrap();
        let left = || fs::read_dir(&trash).unwrap().count();
        assert_eq!(left(), 2);
        empty(&trash);
        while left() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        empty(&dir.path().join("none"));
        let _turn = TURN.lock().await;
    }
}
