//! Where a pod's files are. Every path follows from the id, so that a daemon
//! that knows only the id can free everything.

use std::path::PathBuf;

use agent_api::POD_ETC;

use crate::config::Config;
use crate::host::rootfs::Place;

/// Unix socket paths hold 107 bytes; a 64-digit id would use most of them.
const DIR_ID_DIGITS: usize = 16;

/// Where what pods have written is moved, to be deleted in the background.
#[must_use]
pub fn trash(config: &Config) -> PathBuf {
    config.root.join("trash")
}

#[derive(Clone, Debug)]
pub struct PodPaths {
    /// Everything volatile.
    pub dir: PathBuf,
    pub control: PathBuf,
    pub vsock: PathBuf,
    pub console: PathBuf,
    /// The VMM's own messages.
    pub vmm_log: PathBuf,
    pub jail: PathBuf,
    /// What the guest sees through virtio-fs.
    pub shared: PathBuf,
    /// Where a volume is put together before it is moved below `shared`.
    pub stage: PathBuf,
    pub scratch: PathBuf,
    pub netns_name: String,
    pub netns: PathBuf,
    /// Of a pod on the host's kernel: what its containers' /dev/shm is.
    pub shm: PathBuf,
    /// There, what its containers write.
    pub writable: PathBuf,
    /// Beside it, the files of /etc that they share and may write to.
    pub etc: PathBuf,
    /// On the same file system: what is to be deleted.
    pub trash: PathBuf,
}

impl PodPaths {
    #[must_use]
    pub fn new(config: &Config, id: &str) -> Self {
        let short = &id[..id.len().min(DIR_ID_DIGITS)];
        let dir = config.run_dir.join("pods").join(short);
        let netns_name = format!("drupe-{short}");
        Self {
            control: dir.join("control.sock"),
            vsock: dir.join("vsock.sock"),
            console: dir.join("console.log"),
            vmm_log: dir.join("vmm.log"),
            jail: dir.join("jail"),
            shared: dir.join("shared"),
            stage: dir.join("stage"),
            scratch: config.root.join("scratch").join(format!("{short}.ext4")),
            etc: config.root.join("scratch").join(short).join(POD_ETC),
            trash: trash(config),
            writable: config.root.join("scratch").join(short),
            shm: dir.join("shm"),
            netns: config.netns_dir.join(&netns_name),
            netns_name,
            dir,
        }
    }

    /// Where a container's root is made on the host's kernel.
    #[must_use]
    pub fn place(&self, container: &str) -> Place {
        let short = &container[..container.len().min(DIR_ID_DIGITS)];
        Place {
            bundle: self.dir.join("c").join(short),
            writable: self.writable.join(short),
            trash: self.trash.clone(),
        }
    }
}
