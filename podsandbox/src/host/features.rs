//! What an OCI runtime says of itself (`runtime features`, OCI runtime spec,
//! "Features Structure").

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use tokio::process::Command;
use tokio::time::timeout;

/// Linux has `mount_setattr`, which it takes, from this version on.
const RECURSIVE_SINCE: (u32, u32) = (5, 12);

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Features {
    mount_options: Vec<String>,
}

/// A program that hangs must not hold up who asks.
const WITHIN: Duration = Duration::from_secs(2);
/// Programs remembered: a node has one or two.
const MAX_KNOWN: usize = 16;

/// What a program has said, for as long as it is the same file.
static KNOWN: Mutex<BTreeMap<(PathBuf, SystemTime), bool>> = Mutex::new(BTreeMap::new());

/// Whether this runtime can mount a volume read-only with all that is below
/// it. Runs the program once, which takes milliseconds; one without the command
/// has said no, one that hangs says no for now.
pub async fn mounts_read_only_recursively(program: &Path) -> bool {
    let changed = fs::metadata(program).and_then(|metadata| metadata.modified());
    let key = changed.ok().map(|changed| (program.to_owned(), changed));
    if let Some(known) = key.as_ref().and_then(|key| known().get(key).copied()) {
        return known && is_kernel_able();
    }
    let asked = Command::new(program)
        .arg("features")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let told = match timeout(WITHIN, asked).await {
        Ok(Ok(output)) => output.status.success() && is_told(&output.stdout),
        Ok(Err(error)) => {
            tracing::debug!(?program, %error, "cannot ask an OCI runtime for its features");
            return false;
        }
        Err(_) => {
            tracing::warn!(
                ?program,
                "an OCI runtime does not tell its features in time"
            );
            return false;
        }
    };
    if let Some(key) = key {
        let mut known = known();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(key, told);
    }
    told && is_kernel_able()
}

fn known() -> MutexGuard<'static, BTreeMap<(PathBuf, SystemTime), bool>> {
    // Every change is one call.
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_told(features: &[u8]) -> bool {
    let features: Features = serde_json::from_slice(features).unwrap_or_default();
    features.mount_options.iter().any(|option| option == "rro")
}

fn is_kernel_able() -> bool {
    kernel_version().is_some_and(|release| release >= RECURSIVE_SINCE)
}

/// The first two numbers of the host's.
pub fn kernel_version() -> Option<(u32, u32)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    version(&release)
}

/// `6.1.0-18-amd64`
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_that_does_not_tell_cannot() {
        assert!(is_told(br#"{"mountOptions":["ro","rro"],"hooks":[]}"#));
        for features in [&br#"{"mountOptions":["ro"]}"#[..], b"{}", b"no json", b""] {
            assert!(!is_told(features));
        }
    }

    fn script(dir: &Path, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("runtime");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn a_program_is_asked_once_and_not_waited_for() {
        for program in ["/no/such/runtime", "/bin/false"] {
            assert!(!mounts_read_only_recursively(Path::new(program)).await);
        }
        let dir = tempfile::tempdir().unwrap();
        let count = dir.path().join("count");
        let told = r#"{"mountOptions":["rro"]}"#;
        let text = format!("#!/bin/sh\necho x >> {}\necho '{told}'\n", count.display());
        let program = script(dir.path(), &text);
        for _ in 0..3 {
            assert!(mounts_read_only_recursively(&program).await);
        }
        assert_eq!(fs::read_to_string(&count).unwrap(), "x\n");

        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "#!/bin/sh\nexec sleep 1000\n");
        let answer = timeout(WITHIN * 5, mounts_read_only_recursively(&program)).await;
        assert!(!answer.unwrap());
    }

    #[test]
    fn releases_are_compared_by_their_numbers() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version("5.12-rc1"), Some((5, 12)));
        assert_eq!(version("six"), None);
        assert!(version("5.4.0").unwrap() < RECURSIVE_SINCE);
    }
}
