//! Whether a volume's host path can pass mounts on as it is asked to.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::spec::{Mount, Propagation};
use crate::volumes::{find_source, unescape};
use crate::{Error, Result};

/// Fails for a volume whose mounts would not travel: a promise to a storage
/// driver that is not kept is found out much later.
pub fn check(volumes: &[Mount]) -> Result<()> {
    // Nothing is ever mounted in an image.
    let asks =
        |volume: &&Mount| volume.propagation != Propagation::Private && volume.image.is_none();
    if !volumes.iter().any(|volume| asks(&volume)) {
        return Ok(());
    }
    let table = Path::new("/proc/self/mountinfo");
    let text = fs::read(table).map_err(|source| Error::File {
        what: "mount table",
        path: table.to_owned(),
        source,
    })?;
    for volume in volumes.iter().filter(asks) {
        let path = find_source(&volume.host_path)?;
        let mount = mount_of(&text, &path);
        let (fits, wanted) = match volume.propagation {
            Propagation::Private => continue,
            Propagation::HostToContainer => (mount.shared || mount.slave, "shared or slave"),
            Propagation::Bidirectional => (mount.shared, "shared"),
        };
        if !fits {
            let why = format!("the mount {:?} that it is on is not {wanted}", mount.point);
            return Err(Error::MountSource {
                path: volume.host_path.clone(),
                source: io::Error::new(io::ErrorKind::InvalidInput, why),
            });
        }
    }
    Ok(())
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    point: PathBuf,
    shared: bool,
    slave: bool,
}

/// The mount that `path` is on: of the longest mount points above it the last
/// (proc_pid_mountinfo(5)).
fn mount_of(table: &[u8], path: &Path) -> Found {
    let mut best = Found::default();
    for line in table.split(|&b| b == b'\n') {
        let mut fields = line.split(|&b| b == b' ');
        let Some(point) = fields.nth(4).map(unescape) else {
            continue;
        };
        let longer = point.components().count() >= best.point.components().count();
        if !path.starts_with(&point) || !longer {
            continue;
        }
        let options: Vec<&[u8]> = fields.skip(1).take_while(|f| *f != b"-").collect();
        let has = |prefix: &[u8]| options.iter().any(|option| option.starts_with(prefix));
        best = Found {
            point,
            shared: has(b"shared:"),
            slave: has(b"master:"),
        };
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"1 0 8:1 / / rw,relatime - ext4 /dev/a rw\n\
        2 1 0:2 / /srv rw shared:7 - tmpfs t rw\n\
        3 1 0:3 / /srv/a\\040b rw master:7 propagate_from:2 - tmpfs t rw\n\
        4 1 0:3 / /srv/a\\040b rw shared:9 master:7 - tmpfs t rw\n";

    fn found(path: &str) -> (bool, bool) {
        let found = mount_of(TABLE, Path::new(path));
        (found.shared, found.slave)
    }

    #[test]
    fn the_nearest_and_last_mount_decides() {
        assert_eq!(found("/etc/x"), (false, false));
        assert_eq!(found("/srv"), (true, false));
        assert_eq!(found("/srvx"), (false, false));
        assert_eq!(found("/srv/a b/c"), (true, true));
    }
}
