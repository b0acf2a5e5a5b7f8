//! Whether containers can have their images' pages for themselves.

use std::path::Path;

use imagesvc::private_cache;

use super::Verdict::{self, Bad, Good};
use crate::config::Config;

/// `None`: nobody wants it.
pub(super) fn verdict(config: &Config) -> Option<Verdict> {
    config
        .images
        .private_cache
        .then(|| can_clone(there(&config.root)))
}

fn can_clone(dir: &Path) -> Verdict {
    match private_cache::try_in(dir) {
        Ok(()) => Good(format!("the file system of {} has clones", dir.display())),
        Err(error) => Bad {
            found: format!(
                "no container with a kernel of its own can be created: files in {} cannot be cloned: {error}",
                dir.display()
            ),
            remedy: "put `root` on Btrfs or on XFS with reflink; or `images.private_cache: false`"
                .to_owned(),
        },
    }
}

/// The directory, or the one above in which the daemon will make it.
fn there(dir: &Path) -> &Path {
    let there = dir.ancestors().find(|dir| dir.is_dir());
    there.unwrap_or(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_without_clones_is_bad_where_they_are_wanted() {
        let mut config = Config {
            // A tmpfs.
            root: "/dev/shm/drupe/of/tomorrow".into(),
            ..Config::default()
        };
        assert!(verdict(&config).is_none());
        config.images.private_cache = true;
        let Some(Bad { found, remedy }) = verdict(&config) else {
            panic!("not bad");
        };
        assert!(found.contains("/dev/shm cannot be cloned"), "{found}");
        assert!(remedy.contains("Btrfs"), "{remedy}");
    }
}
