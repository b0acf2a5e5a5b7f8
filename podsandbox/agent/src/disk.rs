//! The guest's virtio disks, found by serial, and the partitions that carry an
//! image's layers.
//!
//! A disk has no partition table: the daemon says which byte ranges hold
//! layers, and the kernel is told of each as a partition by `BLKPG` (linux/
//! blkpg.h), which costs nothing and leaves block numbers as the layer has
//! them.

use std::collections::BTreeMap;
use std::ffi::{CString, c_int, c_longlong, c_void};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use tokio::time::{Instant, sleep};

/// Multiple of which ranges start and end: the block size of EROFS.
const ALIGNMENT: u64 = 4096;

/// A disk whose backing was attached shows its size once the guest has
/// handled the configuration interrupt: within a millisecond, or later on a
/// loaded node.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);

/// The kernel announces no change from an empty disk (block/genhd.c,
/// `set_capacity_and_notify`), so its size has to be looked at.
const ATTACH_INTERVAL: Duration = Duration::from_millis(1);

/// The last user of a partition may be a mount namespace that the kernel takes
/// down in the background.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// First wait before a busy partition is tried again; doubled each time.
const RELEASE_INTERVAL: Duration = Duration::from_millis(1);

/// The kernel's `DISK_MAX_PARTS`, less the disk itself.
pub const MAX_PARTITIONS: usize = 255;

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("the guest has no disk with serial {serial}")]
    NoDisk { serial: String },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{count} layers, more than the {MAX_PARTITIONS} that a disk can be divided into")]
    TooManyLayers { count: usize },
    #[error(
        "layer {index} (offset {offset}, length {length}) is empty, not aligned to {ALIGNMENT} or out of range"
    )]
    Range {
        index: usize,
        offset: u64,
        length: u64,
    },
    #[error("disk {serial} has {actual} bytes, its layers end at {wanted}")]
    TooSmall {
        serial: String,
        actual: u64,
        wanted: u64,
    },
    #[error("disk {serial} is used by another container")]
    InUse { serial: String },
    #[error("cannot make partition {number} of {disk}")]
    Add {
        disk: String,
        number: usize,
        source: io::Error,
    },
    #[error("disk {serial} has {actual} bytes, not the {wanted} of the device attached to it")]
    Size {
        serial: String,
        actual: u64,
        wanted: u64,
    },
    #[error("cannot make {disk} read-only or writable")]
    ReadOnly { disk: String, source: io::Error },
    #[error("cannot write {disk} back")]
    WriteBack { disk: String, source: io::Error },
    #[error("cannot remove partition {number} of {disk}")]
    Remove {
        disk: String,
        number: usize,
        source: io::Error,
    },
}

/// The block device `name` of the kernel, such as `vdb`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    name: String,
    serial: String,
}

impl Disk {
    /// Looks at the virtio disks one by one until it is found. Serials do not
    /// change, and each look is a request to the VMM, so they are kept.
    pub fn find(serial: &str) -> Result<Self, DiskError> {
        static SEEN: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
        // The map is whole whatever a holder did.
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        let disk = |name: &String| Self {
            name: name.clone(),
            serial: serial.to_owned(),
        };
        if let Some(name) = seen.get(serial) {
            return Ok(disk(name));
        }
        for name in disk_names()? {
            if seen.values().any(|known| *known == name) {
                continue;
            }
            let path = Path::new("/sys/block").join(&name).join("serial");
            let found =
                fs::read_to_string(&path).map_err(|source| DiskError::Read { path, source })?;
            let found = found.trim_end_matches(['\n', '\0']).to_owned();
            let wanted = found == serial;
            seen.insert(found, name.clone());
            if wanted {
                return Ok(disk(&name));
            }
        }
        Err(DiskError::NoDisk {
            serial: serial.to_owned(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn device(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// Waits until it is as large as what was attached to it: no more, for it
    /// may show the disk before for a moment.
    pub async fn wait_for_size(&self, wanted: u64) -> Result<(), DiskError> {
        let deadline = Instant::now() + ATTACH_TIMEOUT;
        loop {
            let actual = self.bytes()?;
            if actual == wanted {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let serial = self.serial.clone();
                return Err(DiskError::Size {
                    serial,
                    actual,
                    wanted,
                });
            }
            sleep(ATTACH_INTERVAL).await;
        }
    }

    /// Its size now; 0 while nothing is attached.
    fn bytes(&self) -> Result<u64, DiskError> {
        let path = Path::new("/sys/block").join(&self.name).join("size");
        let text = fs::read_to_string(&path).map_err(|source| DiskError::Read {
            path: path.clone(),
            source,
        })?;
        // Always in sectors of 512 bytes, whatever the disk's block size.
        Ok(text.trim().parse::<u64>().unwrap_or(0).saturating_mul(512))
    }

    async fn wait_for(&self, wanted: u64) -> Result<(), DiskError> {
        let deadline = Instant::now() + ATTACH_TIMEOUT;
        loop {
            let actual = self.bytes()?;
            if actual >= wanted {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let serial = self.serial.clone();
                return Err(DiskError::TooSmall {
                    serial,
                    actual,
                    wanted,
                });
            }
            sleep(ATTACH_INTERVAL).await;
        }
    }
}

/// The virtio disks in the order in which the VMM has them: vda to vdz, vdaa.
fn disk_names() -> Result<Vec<String>, DiskError> {
    let dir = Path::new("/sys/block");
    let failed = |source| DiskError::Read {
        path: dir.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry
            .map_err(failed)?
            .file_name()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("vd") {
            names.push(name);
        }
    }
    names.sort_by_key(|name| (name.len(), name.clone()));
    Ok(names)
}

/// A layer's bytes on its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub offset: u64,
    pub length: u64,
}

/// The partitions of one disk, in the order of the ranges they were made of.
#[derive(Debug)]
pub struct Partitions {
    disk: Disk,
    file: File,
    /// Partitions 1 to `count` exist.
    count: usize,
}

impl Partitions {
    /// Waits until the disk is as large as the ranges say and makes a
    /// partition for each.
    pub async fn create(disk: Disk, ranges: &[Range]) -> Result<Self, DiskError> {
        let wanted = check(ranges)?;
        disk.wait_for(wanted).await?;
        let path = disk.device();
        let file = File::open(&path).map_err(|source| DiskError::Read { path, source })?;
        // The slot may have held a disk that could be written.
        set_read_only(&file, disk.name(), true)?;
        let mut partitions = Self {
            disk,
            file,
            count: 0,
        };
        for range in ranges {
            if let Err(error) = partitions.add(*range) {
                if let Err(undo) = partitions.remove().await {
                    eprintln!("drupe-agent: {undo}");
                }
                return Err(error);
            }
        }
        Ok(partitions)
    }

    fn add(&mut self, range: Range) -> Result<(), DiskError> {
        let number = self.count + 1;
        blkpg(&self.file, BLKPG_ADD_PARTITION, number, range).map_err(|errno| match errno {
            Errno::EBUSY if number == 1 => DiskError::InUse {
                serial: self.disk.serial.clone(),
            },
            errno => DiskError::Add {
                disk: self.disk.name.clone(),
                number,
                source: errno.into(),
            },
        })?;
        self.count = number;
        Ok(())
    }

    /// Device files of the partitions, lowest layer first.
    pub fn devices(&self) -> impl DoubleEndedIterator<Item = CString> + '_ {
        (1..=self.count).filter_map(|number| {
            // A kernel's name has no null byte.
            CString::new(format!("/dev/{}{number}", self.disk.name)).ok()
        })
    }

    /// Removes them. They may be busy for a moment after their last mount went.
    pub async fn remove(&mut self) -> Result<(), DiskError> {
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        while self.count > 0 {
            remove_partition(&self.file, self.disk.name(), self.count, deadline).await?;
            self.count -= 1;
        }
        Ok(())
    }
}

/// Removes a partition of the disk behind `file`, by `deadline` if it is busy.
/// Fine with its being gone.
async fn remove_partition(
    file: &File,
    disk: &str,
    number: usize,
    deadline: Instant,
) -> Result<(), DiskError> {
    let mut interval = RELEASE_INTERVAL;
    let nothing = Range {
        offset: 0,
        length: 0,
    };
    loop {
        match blkpg(file, BLKPG_DEL_PARTITION, number, nothing) {
            Ok(()) | Err(Errno::ENXIO) => return Ok(()),
            Err(Errno::EBUSY) if Instant::now() < deadline => {
                sleep(interval).await;
                interval *= 2;
            }
            Err(errno) => {
                return Err(DiskError::Remove {
                    disk: disk.to_owned(),
                    number,
                    source: errno.into(),
                });
            }
        }
    }
}

/// The end of the last range.
fn check(ranges: &[Range]) -> Result<u64, DiskError> {
    if ranges.len() > MAX_PARTITIONS {
        return Err(DiskError::TooManyLayers {
            count: ranges.len(),
        });
    }
    let mut end = 0;
    for (index, &Range { offset, length }) in ranges.iter().enumerate() {
        let last = offset.checked_add(length).filter(|&last| {
            length > 0
                && offset.is_multiple_of(ALIGNMENT)
                && length.is_multiple_of(ALIGNMENT)
                && i64::try_from(last).is_ok()
        });
        end = end.max(last.ok_or(DiskError::Range {
            index,
            offset,
            length,
        })?);
    }
    Ok(end)
}

/// Removes the partitions that a container has made, or has had the kernel find,
/// on a disk of its own.
pub(crate) async fn remove_all_partitions(file: &File, disk: &Disk) -> Result<(), DiskError> {
    let path = Path::new("/sys/block").join(&disk.name);
    let failed = |source| DiskError::Read {
        path: path.clone(),
        source,
    };
    let deadline = Instant::now() + RELEASE_TIMEOUT;
    for entry in fs::read_dir(&path).map_err(failed)? {
        // What else is there has no such file.
        let number = fs::read_to_string(entry.map_err(failed)?.path().join("partition"));
        if let Some(number) = number.ok().and_then(|text| text.trim().parse().ok()) {
            remove_partition(file, &disk.name, number, deadline).await?;
        }
    }
    Ok(())
}

// linux/fs.h.
const BLKFLSBUF: libc::c_ulong = 0x1261;

/// Forgets what the guest has cached of the disk behind `file`.
pub(crate) fn drop_cache(file: &File, disk: &Disk) -> Result<(), DiskError> {
    // SAFETY: BLKFLSBUF takes no argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKFLSBUF, 0) };
    Errno::result(result)
        .map(drop)
        .map_err(|errno| DiskError::WriteBack {
            disk: disk.name.clone(),
            source: errno.into(),
        })
}

const BLKROSET: libc::c_ulong = 0x125d;

/// Has the guest's kernel refuse writing to the disk behind `file`, which the
/// VMM does in any case, or take it.
pub(crate) fn set_read_only(file: &File, disk: &str, read_only: bool) -> Result<(), DiskError> {
    let value = c_int::from(read_only);
    // SAFETY: BLKROSET reads one int, which lives.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKROSET, &raw const value) };
    Errno::result(result)
        .map(drop)
        .map_err(|errno| DiskError::ReadOnly {
            disk: disk.to_owned(),
            source: errno.into(),
        })
}

// linux/blkpg.h.
const BLKPG: libc::c_ulong = 0x1269;
const BLKPG_ADD_PARTITION: c_int = 1;
const BLKPG_DEL_PARTITION: c_int = 2;

#[repr(C)]
struct BlkpgPartition {
    start: c_longlong,
    length: c_longlong,
    number: c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

#[repr(C)]
struct BlkpgRequest {
    operation: c_int,
    flags: c_int,
    data_length: c_int,
    data: *mut c_void,
}

fn blkpg(disk: &File, operation: c_int, number: usize, range: Range) -> Result<(), Errno> {
    let mut partition = BlkpgPartition {
        start: c_longlong::try_from(range.offset).map_err(|_| Errno::EOVERFLOW)?,
        length: c_longlong::try_from(range.length).map_err(|_| Errno::EOVERFLOW)?,
        number: c_int::try_from(number).map_err(|_| Errno::EOVERFLOW)?,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let request = BlkpgRequest {
        operation,
        flags: 0,
        data_length: size_of::<BlkpgPartition>() as c_int,
        data: (&raw mut partition).cast(),
    };
    // SAFETY: BLKPG reads one request and the partition it points to, both of
    // which live and have the kernel's layout.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const request) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, length: u64) -> Range {
        Range { offset, length }
    }

    #[test]
    fn the_disk_has_to_reach_the_end_of_the_last_layer() {
        assert_eq!(check(&[range(0, 4096), range(8192, 4096)]).unwrap(), 12288);
        assert_eq!(check(&[]).unwrap(), 0);
    }

    #[test]
    fn ranges_that_no_partition_can_have_are_refused() {
        for bad in [
            range(0, 0),
            range(1, 4096),
            range(0, 512),
            range(u64::MAX - 4095, 4096),
        ] {
            assert!(
                matches!(check(&[bad]), Err(DiskError::Range { .. })),
                "{bad:?}"
            );
        }
        let many = vec![range(0, 4096); MAX_PARTITIONS + 1];
        assert!(matches!(check(&many), Err(DiskError::TooManyLayers { .. })));
    }
}
