//! virtio-fs (virtio 1.2 §5.11): the pod's shared directory, served in process
//! by the `virtiofsd` library.
//!
//! Requests are worked off in the call that finds them, file system I/O of the
//! host included, so this device has an event loop, and thereby a thread, of
//! its own. What the thread needs to be is in [`credentials`].
//!
//! The host changes files under the guest: the kubelet swaps the symlink of a
//! ConfigMap, the daemon mounts another volume. The guest may cache, but asks
//! again after [`CACHE_TIMEOUT`].

mod credentials;
#[cfg(test)]
mod tests;

use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::thread::ThreadId;
use std::time::Duration;

use nix::sys::epoll::EpollFlags;
use nix::sys::resource::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::fuse::Opcode;
use virtiofsd::passthrough::{
    CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs,
};
use virtiofsd::server::Server;
use virtiofsd::soft_idmap::cmdline::IdMap;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_client::IdRange;

use super::again::Again;
use super::iov::{self, Iov};
use super::queue::Chain;
use super::{Device, Io, Poller};

/// hiprio (FORGET) and one request queue. Linux lets one request fill the
/// request queue but for a few descriptors: 512 leave room for 1 MiB.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// `struct virtio_fs_config`: a tag padded with zeroes, `num_request_queues`.
const TAG_LEN: usize = 36;
const CONFIG_LEN: usize = TAG_LEN + 4;

/// How long the guest may believe a name or an attribute it has seen. The
/// kubelet promises volumes that are updated "eventually"; a second is sooner
/// than its own sync loop, and saves most of the lookups.
const CACHE_TIMEOUT: Duration = Duration::from_secs(1);

/// Requests handled before other events of the loop have their turn.
const REQUESTS_PER_TURN: usize = 256;

/// Descriptors of this process that files of the guest may not take up: vsock
/// connections have theirs.
const RESERVED_FDS: u64 = 8192;

/// `struct fuse_in_header` and `struct fuse_out_header`.
const IN_HEADER_LEN: usize = 40;
const OUT_HEADER_LEN: usize = 16;

const TOKEN_AGAIN: u32 = 0;

/// The highest id there is; the daemon maps none of the pod's to it.
const NOBODY: u32 = u32::MAX - 1;

#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error("{0:?} is not a virtio-fs tag: 1 to {TAG_LEN} bytes without NUL")]
    Tag(String),
    #[error("serving the shared directory {path}")]
    Root { path: PathBuf, source: io::Error },
    #[error("making the file system device")]
    Setup(#[source] io::Error),
}

/// What the guest can see of the device. Inodes and handles it holds are the
/// library's to save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The driver's choice of features.
    pub features: u64,
    pub tag: String,
}

pub struct Fs {
    state: State,
    server: Server<PassthroughFs>,
    again: Again,
    /// The thread that was made ready to serve.
    thread: Option<ThreadId>,
}

impl Fs {
    /// Serves `root`, an absolute path as it will be when the guest mounts it,
    /// under the name `tag`.
    pub fn new(root: &Path, tag: &str) -> Result<Self, FsError> {
        Self::with_ids(root, tag, None)
    }

    /// With the owners of files shown to the guest as `ids` says.
    pub fn with_ids(root: &Path, tag: &str, ids: Option<IdRange>) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_LEN || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let bad_root = |source| FsError::Root {
            path: root.to_owned(),
            source,
        };
        if !std::fs::metadata(root).map_err(bad_root)?.is_dir() {
            return Err(bad_root(io::ErrorKind::NotADirectory.into()));
        }
        let root_dir = root
            .to_str()
            .ok_or_else(|| bad_root(io::ErrorKind::InvalidFilename.into()))?;
        let (open_files, _) =
            getrlimit(Resource::RLIMIT_NOFILE).map_err(|e| FsError::Setup(e.into()))?;

        let passthrough = credentials::with_own_umask(|| {
            PassthroughFs::new(Config {
                entry_timeout: CACHE_TIMEOUT,
                attr_timeout: CACHE_TIMEOUT,
                cache_policy: CachePolicy::Auto,
                root_dir: root_dir.to_owned(),
                xattr: true,
                // Each volume is a mount of its own: without this, files of
                // two volumes with one inode number would be one to the guest.
                announce_submounts: true,
                // Handles would need CAP_DAC_READ_SEARCH, with which a process
                // can open any inode of a file system.
                inode_file_handles: InodeFileHandlesMode::Never,
                posix_acl: NegotiationMode::Never,
                security_label: NegotiationMode::Never,
                uid_map: ids.map(id_map),
                gid_map: ids.map(id_map),
                guest_fd_limit: open_files.saturating_sub(RESERVED_FDS).max(open_files / 2),
                ..Config::default()
            })
        })
        .map_err(bad_root)?;
        Ok(Self {
            state: State {
                features: 0,
                tag: tag.to_owned(),
            },
            server: Server::new(passthrough),
            again: Again::new().map_err(FsError::Setup)?,
            thread: None,
        })
    }

    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// The first call on a thread makes it ready to serve.
    fn ready_thread(&mut self) -> io::Result<()> {
        let current = std::thread::current().id();
        if self.thread != Some(current) {
            credentials::ready_thread()?;
            self.thread = Some(current);
        }
        Ok(())
    }

    fn serve(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()> {
        self.ready_thread()?;
        if !io.queues.get(index).is_some_and(QueueT::ready) {
            return Ok(());
        }
        for _ in 0..REQUESTS_PER_TURN {
            let Some(chain) = io.next_chain(index)? else {
                return Ok(());
            };
            let head = chain.head_index();
            let written = self.request(io.mem, chain);
            io.give_back(index, head, written)?;
            // Each at once: the next one may take its time on the disk.
            io.notify(index)?;
        }
        self.again.ring()
    }

    /// Handles one FUSE request; the bytes of its reply.
    fn request(&self, mem: &GuestMemoryMmap, chain: Chain<'_>) -> u32 {
        let Ok((mut readable, writable)) = iov::split(chain.clone(), mem) else {
            tracing::debug!("virtio-fs: a request outside of guest memory was dropped");
            return 0;
        };
        let Some(header) = readable.take_bytes::<IN_HEADER_LEN>() else {
            tracing::debug!("virtio-fs: a request shorter than its header was dropped");
            return 0;
        };
        // The library takes room for a reply's header for granted.
        if writable.len() < OUT_HEADER_LEN && !is_silent(&header) {
            tracing::debug!("virtio-fs: a request without room for its reply was dropped");
            return 0;
        }
        match self.handle(mem, chain) {
            Ok(written) => u32::try_from(written).unwrap_or(u32::MAX),
            Err(error) => {
                tracing::debug!(%error, "virtio-fs: a request could not be understood");
                reply_error(&header, &writable)
            }
        }
    }

    fn handle(&self, mem: &GuestMemoryMmap, chain: Chain<'_>) -> io::Result<usize> {
        let view = View::of(mem)?;
        let reader = Reader::new(view.get(), chain.clone()).map_err(io::Error::other)?;
        let writer = Writer::new(view.get(), chain).map_err(io::Error::other)?;
        // No DAX window: nothing to map.
        let mapper: Option<&mut ()> = None;
        self.server
            .handle_message(reader, writer, mapper)
            .map_err(io::Error::other)
    }
}

/// Ids of the host beyond the range are one that no user namespace of the guest
/// has: who is none of the pod's owns nothing there, and gives no rights.
fn id_map(ids: IdRange) -> Vec<IdMap> {
    vec![
        IdMap::Bidirectional {
            guest: ids.guest,
            host: 0,
            count: ids.length,
        },
        IdMap::SquashHost {
            from_host: ids.length,
            to_guest: NOBODY,
            count: u32::MAX - ids.length,
        },
    ]
}

/// Whether a request is one without a reply.
fn is_silent(header: &[u8; IN_HEADER_LEN]) -> bool {
    let mut opcode = [0; 4];
    opcode.copy_from_slice(&header[4..8]);
    let opcode = u32::from_le_bytes(opcode);
    [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt]
        .into_iter()
        .any(|silent| silent as u32 == opcode)
}

/// EIO to a request, as far as there is room for a reply.
fn reply_error(header: &[u8; IN_HEADER_LEN], writable: &Iov<'_>) -> u32 {
    let mut reply = [0; OUT_HEADER_LEN];
    let len = OUT_HEADER_LEN as u32;
    reply[0..4].copy_from_slice(&len.to_le_bytes());
    reply[4..8].copy_from_slice(&(-libc::EIO).to_le_bytes());
    reply[8..16].copy_from_slice(&header[8..16]);
    if writable.fill_from(&reply) == OUT_HEADER_LEN {
        len
    } else {
        0
    }
}

/// The guest's memory with the bitmap type that the library asks for; not a
/// byte is copied. The borrow keeps the mappings while it is in use.
struct View<'m, B> {
    mem: GuestMemoryMmap<B>,
    _mappings: PhantomData<&'m GuestMemoryMmap>,
}

impl<'m, B: Bitmap + Default> View<'m, B> {
    fn of(mem: &'m GuestMemoryMmap) -> io::Result<Self> {
        let mut regions = Vec::with_capacity(mem.num_regions());
        for region in mem.iter() {
            let builder = MmapRegionBuilder::new(region.size())
                .with_mmap_prot(region.prot())
                .with_mmap_flags(region.flags());
            // SAFETY: pointer and size are those of a mapping that `mem` owns,
            // and `self` does not outlive the borrow of `mem`. A region made
            // of a raw pointer does not unmap it.
            let builder = unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) };
            let mapping = builder.build().map_err(io::Error::other)?;
            let region = GuestRegionMmap::new(mapping, region.start_addr())
                .ok_or(io::ErrorKind::InvalidInput)?;
            regions.push(region);
        }
        Ok(Self {
            mem: GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?,
            _mappings: PhantomData,
        })
    }

    fn get(&self) -> &GuestMemoryMmap<B> {
        &self.mem
    }
}

impl Device for Fs {
    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn set_features(&mut self, features: u64) {
        self.state.features = features;
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; CONFIG_LEN];
        let tag = self.state.tag.as_bytes();
        config[..tag.len()].copy_from_slice(tag);
        config[TAG_LEN..].copy_from_slice(&1_u32.to_le_bytes());
        super::read_config_bytes(&config, offset, data);
    }

    fn start(&mut self, poller: Poller) -> io::Result<()> {
        self.again.watch(&poller, TOKEN_AGAIN)
    }

    fn kicked(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()> {
        self.serve(index, io)
    }

    fn host_ready(&mut self, _token: u32, _flags: EpollFlags, io: &mut Io<'_>) -> io::Result<()> {
        self.again.take()?;
        for index in 0..QUEUE_SIZES.len() {
            self.serve(index, io)?;
        }
        Ok(())
    }

    /// Open files and inodes go with the guest's next FUSE INIT.
    fn reset(&mut self) {
        self.state.features = 0;
    }
}
