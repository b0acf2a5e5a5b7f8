//! The file of panics: a line each, with the version of drupe, the id of the
//! pod sandbox and the key of the pod. Read when the daemon starts.

use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Scope;
use crate::Error;
use crate::spec::PodName;

/// Once is chance, and what it was about may be gone.
const ENDS: u32 = 2;
/// Stopping or undoing it does the same.
const ENDS_OF_ALL: u32 = 4;
/// A daemon that has run for so long forgets: pods that were refused are
/// started again. They end it twice an hour at most.
const FORGETS_AFTER: Duration = Duration::from_secs(3600);
/// Of the file; far more than is in it by then.
const MAX_BYTES: u64 = 64 << 10;
/// Another version may have no such fault.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How a pod is dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Posture {
    Serve,
    /// It is not looked at, only stopped and removed.
    Avoid(u32),
    /// Nothing at all is done with it.
    Leave(u32),
}

#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    path: Arc<Path>,
    ends: Arc<Mutex<HashMap<u64, u32>>>,
}

impl Ledger {
    /// A file that cannot be read is told of and taken as empty: without it the
    /// daemon serves as well.
    pub(crate) fn open(path: PathBuf) -> Self {
        let text = match read(&path) {
            Ok(text) => text,
            Err(error) => {
                tracing::error!(?path, %error, "which pods have ended the daemon cannot be read");
                String::new()
            }
        };
        let ledger = Self {
            path: path.into(),
            ends: Arc::new(Mutex::new(count(&text))),
        };
        if !text.is_empty() {
            tracing::warn!(path = ?ledger.path, "the daemon was ended by its own faults: the log before its start tells which");
            let forgetful = ledger.clone();
            tokio::spawn(async move {
                tokio::time::sleep(FORGETS_AFTER).await;
                forgetful.forget();
            });
        }
        ledger
    }

    pub(crate) fn scope(&self, id: &str, pod: &PodName) -> Scope {
        let line = format!("{VERSION} {id} {:016x}\n", key(pod));
        Scope::new(&self.path, line)
    }

    pub(crate) fn posture(&self, pod: &PodName) -> Posture {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        match ends.get(&key(pod)).copied().unwrap_or(0) {
            few if few < ENDS => Posture::Serve,
            some if some < ENDS_OF_ALL => Posture::Avoid(some),
            many => Posture::Leave(many),
        }
    }

    /// For who asks for something of a pod that has ended the daemon.
    pub(crate) fn refusal(&self, pod: &PodName, ends: u32) -> Error {
        Error::EndedDaemon {
            name: pod.to_string(),
            ends,
            ledger: self.path.to_path_buf(),
        }
    }

    fn forget(&self) {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(path = ?self.path, %error, "cannot forget which pods have ended the daemon");
            }
            _ => ends.clear(),
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn count(text: &str) -> HashMap<u64, u32> {
    let mut ends = HashMap::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let key = (words.next() == Some(VERSION))
            .then(|| words.nth(1))
            .flatten();
        if let Some(key) = key.and_then(|key| u64::from_str_radix(key, 16).ok()) {
            *ends.entry(key).or_default() += 1;
        }
    }
    ends
}

/// Attempts of one pod are the same pod.
fn key(pod: &PodName) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&pod.namespace, &pod.name, &pod.uid).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, attempt: u32) -> PodName {
        PodName {
            namespace: "default".to_owned(),
            name: name.to_owned(),
            uid: "u1".to_owned(),
            attempt,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_ends_the_daemon_twice_is_avoided_for_an_hour() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("faults");
        let end = |id: &str, of: &PodName| {
            let scope = Ledger::open(path.clone()).scope(id, of);
            super::super::within(&Some(scope), super::super::note_panic);
        };
        let posture = |of: &PodName| Ledger::open(path.clone()).posture(of);
        end("id1", &pod("bad", 0));
        assert_eq!(posture(&pod("bad", 0)), Posture::Serve);
        end("id2", &pod("bad", 1));
        assert_eq!(posture(&pod("bad", 7)), Posture::Avoid(2));
        assert_eq!(posture(&pod("good", 0)), Posture::Serve);
        end("id3", &pod("bad", 2));
        end("id3", &pod("bad", 2));
        let ledger = Ledger::open(path.clone());
        assert_eq!(ledger.posture(&pod("bad", 0)), Posture::Leave(4));

        tokio::time::sleep(FORGETS_AFTER + Duration::from_secs(1)).await;
        assert_eq!(ledger.posture(&pod("bad", 0)), Posture::Serve);
        assert_eq!(posture(&pod("bad", 0)), Posture::Serve);
    }

    #[test]
    fn other_versions_and_what_is_no_line_do_not_count() {
        let line = |version: &str| format!("{version} id {:016x}\n", key(&pod("a", 0)));
        let text = line(VERSION) + &line("0.0.0") + "\n\u{fffd} x y\n" + VERSION + " torn";
        assert_eq!(count(&text), HashMap::from([(key(&pod("a", 0)), 1)]));
    }
}
