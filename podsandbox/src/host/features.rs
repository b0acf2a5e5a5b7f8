//! What an OCI runtime says of itself (`runtime features`, OCI runtime spec,
//! "Features Structure").

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

/// Linux has `mount_setattr`, which it takes, from this version on.
const RECURSIVE_SINCE: (u32, u32) = (5, 12);

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Features {
    mount_options: Vec<String>,
}

/// Whether this runtime can mount a volume read-only with all that is below
/// it. Runs the program, which takes milliseconds; one without the command has
/// said no.
#[must_use]
pub fn mounts_read_only_recursively(program: &Path) -> bool {
    let output = Command::new(program)
        .arg("features")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let output = match output {
        Ok(output) if output.status.success() => output.stdout,
        Ok(_) => return false,
        Err(error) => {
            tracing::debug!(?program, %error, "cannot ask an OCI runtime for its features");
            return false;
        }
    };
    is_told(&output) && is_kernel_able()
}

fn is_told(features: &[u8]) -> bool {
    let features: Features = serde_json::from_slice(features).unwrap_or_default();
    features.mount_options.iter().any(|option| option == "rro")
}

fn is_kernel_able() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok();
    let release = release.and_then(|release| version(&release));
    release.is_some_and(|release| release >= RECURSIVE_SINCE)
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
        assert!(!mounts_read_only_recursively(Path::new("/no/such/runtime")));
        assert!(!mounts_read_only_recursively(Path::new("false")));
    }

    #[test]
    fn releases_are_compared_by_their_numbers() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version("5.12-rc1"), Some((5, 12)));
        assert_eq!(version("six"), None);
        assert!(version("5.4.0").unwrap() < RECURSIVE_SINCE);
    }
}
