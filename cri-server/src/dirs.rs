//! The daemon's own directories: made for root alone, and refused where anyone
//! else could put something in their place.
//!
//! ```text
//! bit                       on the directory                above it
//! owner not root            refused                         refused
//! write, group or others    refused                         refused, unless sticky (/tmp)
//! read or search, others    a warning, where pods' files    fine
//!                           and records are
//! ```
//! A group that is root's own is root. What is checked is what a path leads to,
//! links followed: the root directory may be a link to the disk that has room.

use std::fs::{self, Metadata};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::config::Config;

const WRITE_GROUP: u32 = 0o020;
const WRITE_OTHERS: u32 = 0o002;
/// Only who owns a file of the directory renames or deletes it.
const STICKY: u32 = 0o1000;
const NOT_OWNER: u32 = 0o077;

#[derive(Debug, thiserror::Error)]
pub enum DirError {
    #[error("cannot create {path:?}")]
    Create {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot look at {path:?}")]
    Look {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path:?} is no directory: move it away or configure another")]
    NoDirectory { path: PathBuf },
    #[error(
        "{path:?} {why}, who can then put something else in the place of {below:?}, which is drupe's: {remedy}"
    )]
    Foreign {
        path: PathBuf,
        below: PathBuf,
        why: String,
        remedy: String,
    },
}

/// What others can see of a directory that only root can change.
#[derive(Debug, PartialEq, Eq)]
pub enum Privacy {
    Kept,
    /// In words, and what helps.
    Open {
        found: String,
        remedy: String,
    },
}

/// Makes what is missing and checks all. What is worth a warning is returned.
///
/// # Errors
///
/// When a directory cannot be made, or is not root's alone to change.
pub fn prepare(config: &Config) -> Result<Vec<String>, DirError> {
    let mut warnings = Vec::new();
    for Own {
        path,
        mode,
        is_private,
    } in own(config)
    {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(&path)
            .map_err(|source| DirError::Create {
                path: path.clone(),
                source,
            })?;
        if let Privacy::Open { found, remedy } = check(&path)?
            && is_private
        {
            warnings.push(format!("{found}: {remedy}"));
        }
    }
    Ok(warnings)
}

/// A directory of the daemon's.
pub struct Own {
    pub path: PathBuf,
    /// With which it is made.
    mode: u32,
    /// Whether only the daemon may look into it: pods' volumes, disks, consoles
    /// and records are below.
    pub is_private: bool,
}

/// All of them, each after those above it.
pub fn own(config: &Config) -> Vec<Own> {
    let own = |path: PathBuf, mode, is_private| Own {
        path,
        mode,
        is_private,
    };
    let mut dirs = vec![
        own(config.root.clone(), 0o700, true),
        own(config.run_dir.clone(), 0o700, false),
        own(config.run_dir.join("pods"), 0o700, true),
        own(config.root.join("scratch"), 0o700, true),
    ];
    // The socket's own mode says who may use it.
    if let Some(dir) = config.socket.parent() {
        dirs.push(own(dir.to_owned(), 0o755, false));
    }
    dirs
}

/// Fails unless only root, and whoever this process is, can change the
/// directory or any on the way to it.
pub fn check(path: &Path) -> Result<Privacy, DirError> {
    let real = fs::canonicalize(path).map_err(|source| look(path, source))?;
    for dir in real.ancestors() {
        let metadata = fs::metadata(dir).map_err(|source| look(dir, source))?;
        if !metadata.is_dir() {
            return Err(DirError::NoDirectory {
                path: dir.to_owned(),
            });
        }
        let is_above = dir != real;
        if let Some((why, remedy)) = foreign(dir, &metadata, is_above) {
            return Err(DirError::Foreign {
                path: dir.to_owned(),
                below: path.to_owned(),
                why,
                remedy,
            });
        }
    }
    let metadata = fs::metadata(&real).map_err(|source| look(&real, source))?;
    let mode = metadata.mode();
    Ok(if mode & NOT_OWNER == 0 {
        Privacy::Kept
    } else {
        let bits = mode & 0o7777;
        Privacy::Open {
            found: format!("{real:?} can be looked into by others than root (mode {bits:04o})"),
            remedy: format!("chmod 700 {}", real.display()),
        }
    })
}

fn look(path: &Path, source: std::io::Error) -> DirError {
    DirError::Look {
        path: path.to_owned(),
        source,
    }
}

/// Who but root could change the directory, and what ends that.
fn foreign(dir: &Path, metadata: &Metadata, is_above: bool) -> Option<(String, String)> {
    let (uid, mode) = (metadata.uid(), metadata.mode());
    let shown = dir.display();
    if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
        return Some((
            format!("belongs to uid {uid}"),
            format!("chown root {shown}"),
        ));
    }
    if is_above && mode & STICKY != 0 {
        return None;
    }
    let bits = mode & 0o7777;
    if mode & WRITE_OTHERS != 0 {
        let why = format!("can be written to by everyone (mode {bits:04o})");
        let remedy = if mode & STICKY != 0 {
            "configure a directory below it".to_owned()
        } else {
            format!("chmod go-w {shown}")
        };
        return Some((why, remedy));
    }
    if mode & WRITE_GROUP != 0 && metadata.gid() != 0 {
        let gid = metadata.gid();
        let why = format!("can be written to by group {gid} (mode {bits:04o})");
        return Some((why, format!("chmod g-w {shown}")));
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn refused(path: &Path) -> String {
        check(path).unwrap_err().to_string()
    }

    #[test]
    fn what_is_missing_is_made_for_root_alone() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            root: dir.path().join("lib/drupe"),
            run_dir: dir.path().join("run"),
            socket: dir.path().join("run/drupe.sock"),
            ..Config::default()
        };
        assert_eq!(prepare(&config).unwrap(), Vec::<String>::new());
        for Own { path, .. } in own(&config) {
            assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o700, "{path:?}");
        }
        // Again, and as an installer may have made them.
        mode(&config.root, 0o755);
        mode(&config.run_dir, 0o755);
        let warnings = prepare(&config).unwrap();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("mode 0755"), "{warnings:?}");
        assert!(warnings[0].contains("chmod 700"), "{warnings:?}");
    }

    #[test]
    fn what_others_can_write_to_is_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("drupe");
        fs::create_dir(&path).unwrap();
        mode(&path, 0o702);
        let said = refused(&path);
        assert!(said.contains("everyone (mode 0702)"), "{said}");
        assert!(said.contains("chmod go-w"), "{said}");
        // What is sticky keeps names, and lets everyone add some.
        mode(&path, 0o1777);
        let said = refused(&path);
        assert!(said.contains("mode 1777"), "{said}");
        assert!(said.contains("a directory below it"), "{said}");
        mode(&path, 0o770);
        // Of root's own group.
        chown(&path, Some(0), Some(0)).unwrap();
        check(&path).unwrap();
        chown(&path, Some(0), Some(4)).unwrap();
        let said = refused(&path);
        assert!(said.contains("group 4 (mode 0770)"), "{said}");
        mode(&path, 0o700);
        chown(&path, Some(65534), Some(0)).unwrap();
        let said = refused(&path);
        assert!(said.contains("belongs to uid 65534"), "{said}");
        assert!(said.contains("chown root"), "{said}");
    }

    #[test]
    fn so_is_what_is_below_such_a_directory_unless_that_is_sticky() {
        let dir = tempfile::tempdir().unwrap();
        let (above, path) = (dir.path().join("above"), dir.path().join("above/drupe"));
        fs::create_dir_all(&path).unwrap();
        mode(&path, 0o700);
        mode(&above, 0o777);
        let said = refused(&path);
        assert!(said.contains("above\" can be written to"), "{said}");
        assert!(said.contains("above/drupe\""), "{said}");
        mode(&above, 0o1777);
        assert_eq!(check(&path).unwrap(), Privacy::Kept);
        chown(&above, Some(1), None).unwrap();
        assert!(refused(&path).contains("belongs to uid 1"));
    }

    #[test]
    fn a_link_is_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, link) = (dir.path().join("disk"), dir.path().join("link"));
        fs::create_dir(&disk).unwrap();
        mode(&disk, 0o700);
        symlink(&disk, &link).unwrap();
        assert_eq!(check(&link).unwrap(), Privacy::Kept);
        mode(&disk, 0o722);
        assert!(refused(&link).contains("disk"));
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(refused(&dir.path().join("file")).contains("no directory"));
        assert!(refused(&dir.path().join("nothing")).contains("cannot look at"));
    }
}
