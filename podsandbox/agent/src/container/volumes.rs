//! What containers' volumes are in the agent's own mount namespace.
//!
//! A volume is a mount of its own below the shared directory, made when it is
//! first looked at. Containers have copies of it; where they ask for it, what
//! one of them mounts in its copy comes here and goes from here to the others.
//! It stays when its maker ends, as it would on a node, unless it shows the
//! maker's own files; and it goes with the volume's last user, or the host
//! could never let go of the volume.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

/// The pod's volumes, with how many mounts of containers are copies of each.
#[derive(Debug, Default)]
pub struct Volumes {
    users: Mutex<BTreeMap<PathBuf, usize>>,
}

/// A container's part in the pod's volumes, given back when it is dropped.
#[derive(Debug)]
pub struct Held {
    volumes: Arc<Volumes>,
    sources: Vec<PathBuf>,
    /// The device of the container's root, when what it mounts may come here.
    root: Option<u64>,
}

impl Volumes {
    /// Sources that are not names in `shared` are nobody's volume.
    pub fn hold(
        self: &Arc<Self>,
        shared: &Path,
        sources: impl Iterator<Item = PathBuf>,
        root: Option<u64>,
    ) -> Held {
        let sources: Vec<PathBuf> = sources.filter(|path| is_name_in(shared, path)).collect();
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        for source in &sources {
            *users.entry(source.clone()).or_default() += 1;
        }
        drop(users);
        Held {
            volumes: self.clone(),
            sources,
            root,
        }
    }

    /// Whether that was the last user.
    fn give_back(&self, source: &Path) -> bool {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(count) = users.get_mut(source) else {
            return false;
        };
        *count -= 1;
        let last = *count == 0;
        if last {
            users.remove(source);
        }
        last
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(root) = self.root
            && let Err(error) = detach_all_of(root, &self.sources)
        {
            eprintln!("drupe-agent: cannot unmount what a container left in a volume: {error}");
        }
        for source in std::mem::take(&mut self.sources) {
            if self.volumes.give_back(&source)
                && let Err(errno) = detach(&source)
            {
                eprintln!(
                    "drupe-agent: cannot let go of {}: {errno}",
                    source.display()
                );
            }
        }
    }
}

fn is_name_in(shared: &Path, path: &Path) -> bool {
    let mut below = path
        .strip_prefix(shared)
        .into_iter()
        .flat_map(Path::components);
    matches!(below.next(), Some(Component::Normal(_))) && below.next().is_none()
}

/// A file is no mount here, nor is a directory that nobody has looked at.
fn detach(path: &Path) -> Result<(), Errno> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        other => other,
    }
}

/// Unmounts what shows files of `device` in one of `volumes`.
fn detach_all_of(device: u64, volumes: &[PathBuf]) -> io::Result<()> {
    let table = fs::read("/proc/self/mountinfo")?;
    let device = format!("{}:{}", libc::major(device), libc::minor(device));
    for path in mounts_of(&table, &device).iter().rev() {
        if volumes.iter().any(|volume| path.starts_with(volume)) {
            detach(path)?;
        }
    }
    Ok(())
}

/// Mount points of a device (proc_pid_mountinfo(5): `ID PARENT MAJOR:MINOR
/// ROOT POINT`), the last one mounted at the end.
fn mounts_of(table: &[u8], device: &str) -> Vec<PathBuf> {
    table
        .split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|&byte| byte == b' ');
            let matches = fields.nth(2)? == device.as_bytes();
            fields.nth(1).filter(|_| matches).map(unescape)
        })
        .collect()
}

/// Blanks and the like stand there as `\` and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| byte == b'\\');
        let code = octal.and_then(|o| u8::from_str_radix(std::str::from_utf8(o).ok()?, 8).ok());
        bytes.push(code.unwrap_or(byte));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsStr::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_let_go_by_its_last_user() {
        let volumes = Arc::new(Volumes::default());
        let shared = Path::new("/s");
        let paths = || ["/s/a", "/s/a", "/s/b"].map(PathBuf::from).into_iter();
        let first = volumes.hold(shared, paths(), None);
        let second = volumes.hold(shared, paths().skip(1), None);
        drop(first);
        assert_eq!(volumes.users.lock().unwrap()[Path::new("/s/a")], 1);
        drop(second);
        assert!(volumes.users.lock().unwrap().is_empty());
    }

    #[test]
    fn only_names_in_the_shared_directory_are_volumes() {
        for path in ["/s", "/s/a/b", "/s/..", "/s/../run", "/dev/x", "s/a"] {
            assert!(!is_name_in(Path::new("/s"), Path::new(path)), "{path}");
        }
        assert!(is_name_in(Path::new("/s"), Path::new("/s/a")));
    }

    #[test]
    fn mounts_are_found_by_their_device() {
        let table = b"22 1 0:21 / /run rw - tmpfs none rw\n\
            40 22 0:33 /etc /run/a\\040b rw shared:3 - overlay none rw\n";
        assert_eq!(mounts_of(table, "0:33"), [PathBuf::from("/run/a b")]);
        assert!(mounts_of(table, "0:3").is_empty());
    }
}
