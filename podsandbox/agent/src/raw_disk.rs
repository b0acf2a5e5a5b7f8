//! Block devices of the node in the guest: disk slots that containers have as
//! device files. Several containers may have one; what is to be undone is
//! undone with the last of them. Owned by a container's [`Rootfs`].
//!
//! [`Rootfs`]: crate::rootfs::Rootfs

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use agent_api::{BlockDisk, image_serial};
use nix::sys::stat::{major, minor};

use crate::disk::{Disk, DiskError, drop_cache, remove_all_partitions, set_read_only};

/// How many containers have a slot.
static USERS: Mutex<BTreeMap<u32, usize>> = Mutex::new(BTreeMap::new());

fn users() -> MutexGuard<'static, BTreeMap<u32, usize>> {
    // The map is whole whatever a holder did.
    USERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One container's hold on a slot.
#[derive(Debug)]
pub struct RawDisk {
    slot: u32,
    disk: Disk,
    pub major: u64,
    pub minor: u64,
}

impl RawDisk {
    /// Waits until the disk is there.
    pub async fn take(wanted: &BlockDisk) -> Result<Self, DiskError> {
        let disk = Disk::find(&image_serial(wanted.slot))?;
        disk.wait_for_size(wanted.bytes).await?;
        let (file, number) = open(&disk)?;
        set_read_only(&file, disk.name(), wanted.read_only)?;
        *users().entry(wanted.slot).or_default() += 1;
        Ok(Self {
            slot: wanted.slot,
            disk,
            major: major(number),
            minor: minor(number),
        })
    }

    /// To be called again until it succeeds, after which the slot may be
    /// detached unless another container has it: what was written is on the
    /// node's device, and nothing here remembers the disk.
    pub async fn release(&self) -> Result<(), DiskError> {
        let is_last = users().get(&self.slot).is_none_or(|&count| count <= 1);
        if is_last {
            let (file, _) = open(&self.disk)?;
            let disk = self.disk.clone();
            let written = tokio::task::spawn_blocking(move || {
                let failed = |source| DiskError::WriteBack {
                    disk: disk.name().to_owned(),
                    source,
                };
                file.sync_all().map_err(failed)?;
                drop_cache(&file, &disk).map(|()| file)
            });
            let file = written.await.map_err(|join| DiskError::WriteBack {
                disk: self.disk.name().to_owned(),
                source: join.into(),
            })??;
            remove_all_partitions(&file, &self.disk).await?;
        }
        let mut users = users();
        match users.get_mut(&self.slot) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(users.remove(&self.slot)),
        }
        Ok(())
    }
}

fn open(disk: &Disk) -> Result<(File, u64), DiskError> {
    let path = disk.device();
    let opened = File::open(&path).and_then(|file| {
        let number = fs::metadata(&path)?.rdev();
        Ok((file, number))
    });
    opened.map_err(|source| DiskError::Read { path, source })
}
