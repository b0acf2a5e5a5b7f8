//! The file server: the process of a pod that has rights over files, and does
//! nothing else.
//!
//! ```text
//! guest ── virtqueue ── monitor (devices/fs) ── channel ── file server ── the pod's shared directory
//!                         │ reads and writes what is open, by its descriptor
//! ```
//!
//! The monitor takes FUSE requests (virtio 1.2 §5.11) off the virtqueue, copies
//! each once and passes it on; the file server answers. With the answer to an
//! OPEN or CREATE comes the descriptor of the open file, and what is read and
//! written from then on moves between that file and the guest's memory in the
//! monitor, which has no right of its own. So the file server sees nothing of
//! the guest's memory, and its root is the shared directory ([`crate::jail`]).
//!
//! It is this program executed again, by the monitor, before that enters its own
//! jail; it ends with the monitor, which is PID 1 of their PID namespace.

mod buffers;
pub mod channel;
mod checked;
#[cfg(any(test, feature = "hostile"))]
pub mod on_thread;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, openat2};
use serde::{Deserialize, Serialize};
use virtiofsd::passthrough::{
    CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs,
};
use virtiofsd::server::Server;
use virtiofsd::soft_idmap::cmdline::IdMap;
use vmm_client::protocol::Reply;
use vmm_client::{Confinement, IdRange, packet};

use self::buffers::Buffers;
use self::channel::{Answer, Asked, NO_ANSWER};
use self::checked::Checked;
use crate::filter::{self, Role, trap};
use crate::jail;

/// How long the guest may believe a name or an attribute it has seen. The
/// kubelet promises volumes that are updated "eventually"; a second is sooner
/// than its own sync loop, and saves most of the lookups.
const CACHE_TIMEOUT: Duration = Duration::from_secs(1);

/// Files and directories that the guest may know of or have open at once, each
/// a descriptor here and, if open, one in the monitor; each pins an inode of the
/// node. A guest's kernel knows what its cache has, so what holds for the open
/// files of a process does not do: a walk through a large volume would fail
/// half-way. It has room for one in 1 KiB of its memory, about; more is no
/// kernel's cache.
const FILES_PER_MIB: u64 = 1024;
/// For the smallest guests, whose kernel may be a thriftier one.
pub const FEWEST_FILES: u64 = 65_536;

/// Descriptors of the file server's own.
const OWN_FDS: u64 = 64;

/// Files of a guest with so much memory.
#[must_use]
pub fn guest_files(memory_mib: u32) -> u64 {
    FEWEST_FILES.max(u64::from(memory_mib) * FILES_PER_MIB)
}

/// Its name in lists of processes, and the word that makes this program it.
pub const NAME: &str = "drupe-files";

/// The highest id there is; the daemon maps none of the pod's to it.
pub(crate) const NOBODY: u32 = u32::MAX - 1;

/// What the file server is told at its start, by one message on its channel.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesSpec {
    pub shared_dir: PathBuf,
    /// An empty directory: where the shared directory becomes the root.
    pub root: PathBuf,
    /// How the guest sees the owners of what is in it; absent: as they are.
    pub ids: Option<IdRange>,
    /// Files that the guest may know of at once, where the node lets a process
    /// have as many: see [`guest_files`].
    pub files: u64,
    /// The pod's: what it is once it has entered its jail.
    pub uid: u32,
    pub gid: u32,
    pub confinement: Confinement,
}

#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("the channel to the monitor")]
    Channel(#[source] io::Error),
    #[error("the monitor has gone")]
    Gone,
    #[error("jail of the file server")]
    Jail(#[from] jail::JailError),
    #[error(
        "the node's kernel has no openat2 (Linux 5.6), without which names could lead out of the shared directory"
    )]
    Openat2(#[source] io::Error),
    #[error("serving the shared directory {path}")]
    Root { path: PathBuf, source: io::Error },
    #[error("its filter of system calls")]
    Filter(#[source] io::Error),
    #[error("the FUSE server")]
    Server(#[from] virtiofsd::Error),
}

/// The whole life of a file server whose channel is its standard input.
pub fn run() -> Result<(), FilesError> {
    crate::close_surplus_descriptors();
    let channel = crate::handoff::take_stdin().map_err(FilesError::Channel)?;
    let received = crate::packet::recv::<FilesSpec>(&channel).map_err(FilesError::Channel)?;
    let (spec, mut teller) = received.ok_or(FilesError::Gone)?;
    if let Some(teller) = teller.pop() {
        trap::tell_through(teller).map_err(FilesError::Channel)?;
    }
    let server = jail::enter_as_file_server(&spec, spec.files + OWN_FDS)
        .map_err(FilesError::from)
        .and_then(|jailed| {
            let files = jailed.files.saturating_sub(OWN_FDS);
            let server = FileServer::new(Path::new("/"), Some(jailed.own_fds), spec.ids, files)?;
            let confine = filter::of_node(spec.confinement).map_err(jail::JailError::from)?;
            confine(Role::FileServer).map_err(FilesError::Filter)?;
            Ok(server)
        });
    let reply = match &server {
        Ok(_) => Reply::Ok,
        Err(error) => Reply::Error {
            message: crate::supervisor::chain(error),
        },
    };
    packet::send(&channel, &reply, &[]).map_err(FilesError::Channel)?;
    server?.serve(&channel)
}

/// Serves one directory, on the thread that made it: whose effective user it is
/// changes with each request.
pub struct FileServer {
    server: Server<Checked>,
    buffers: Buffers,
    opened: checked::Opened,
}

impl FileServer {
    /// Serves `root`, of which the guest may know `files` at once. `own_fds` is
    /// this process's /proc/self/fd where that path is not there. The umask of
    /// the calling process becomes 0.
    pub fn new(
        root: &Path,
        own_fds: Option<File>,
        ids: Option<IdRange>,
        files: u64,
    ) -> Result<Self, FilesError> {
        let bad_root = |source| FilesError::Root {
            path: root.to_owned(),
            source,
        };
        let name = root
            .to_str()
            .ok_or_else(|| bad_root(io::ErrorKind::InvalidFilename.into()))?;
        let dir = File::open(root).map_err(bad_root)?;
        if !dir.metadata().map_err(bad_root)?.is_dir() {
            return Err(bad_root(io::ErrorKind::NotADirectory.into()));
        }
        // Without it the library would look names up by openat(2), links and
        // all, and say nothing. This is how it finds out.
        let probe = openat2(AT_FDCWD, ".", OpenHow::new().flags(OFlag::O_CLOEXEC));
        probe.map_err(|error| FilesError::Openat2(error.into()))?;
        let passthrough = PassthroughFs::new(Config {
            entry_timeout: CACHE_TIMEOUT,
            attr_timeout: CACHE_TIMEOUT,
            cache_policy: CachePolicy::Auto,
            root_dir: name.to_owned(),
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
            guest_fd_limit: files,
            proc_sfd_rawfd: own_fds,
            ..Config::default()
        })
        .map_err(bad_root)?;
        let (checked, opened) = Checked::new(passthrough);
        Ok(Self {
            server: Server::new(checked),
            buffers: Buffers::new().map_err(FilesError::Channel)?,
            opened,
        })
    }

    /// Answers what is asked on `channel`, one request after the other, until
    /// its other end is closed.
    pub fn serve(mut self, channel: &OwnedFd) -> Result<(), FilesError> {
        let mut asked = Asked::default();
        loop {
            if !asked.receive(channel).map_err(FilesError::Channel)? {
                return Ok(());
            }
            let answer = self.answer(&asked)?;
            if asked.key() == NO_ANSWER {
                continue;
            }
            match answer.send(channel) {
                // Nobody is left to answer, who may have left answers unread.
                Err(error) if is_gone(&error) => return Ok(()),
                sent => sent.map_err(FilesError::Channel)?,
            }
        }
    }

    fn answer(&mut self, asked: &Asked) -> Result<Answer, FilesError> {
        let (reader, writer) = self
            .buffers
            .hold(asked.request(), asked.room())
            .map_err(FilesError::Channel)?;
        // No DAX window: nothing to map.
        let mapper: Option<&mut ()> = None;
        let body = match self.server.handle_message(reader, writer, mapper) {
            Ok(written) => self.buffers.reply(written).map_err(FilesError::Channel)?,
            Err(error) => {
                tracing::debug!(%error, "a request could not be understood");
                channel::error_reply(asked.request(), libc::EIO)
            }
        };
        let opened = self.opened.take();
        Ok(Answer::new(asked.key(), opened, body))
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

fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionReset)
}

/// Waits for the word of a file server that was just started.
pub fn started(channel: impl AsFd) -> io::Result<()> {
    match packet::recv::<Reply>(channel)? {
        Some(Reply::Ok) => Ok(()),
        Some(Reply::Error { message }) => Err(io::Error::other(message)),
        _ => Err(io::Error::other(
            "it ended during its start; the log says why",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_know_the_files_that_its_memory_can_remember() {
        assert_eq!(guest_files(32), 65_536);
        assert_eq!(guest_files(512), 524_288);
        assert_eq!(guest_files(u32::MAX), u64::from(u32::MAX) * 1024);
    }
}
