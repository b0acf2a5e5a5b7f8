//! One plugin run at a time for an attachment, beyond the end of a daemon.
//!
//! A plugin outlives a daemon that is killed. Were DEL run beside an ADD that
//! still goes on, either would trip over the other's half-made rules, or the
//! ADD would end last and leak what it made. So a plugin's standard error is
//! the write end of a FIFO beside the records, and that open file description
//! holds a `flock`: the kernel drops it when the last of daemon, plugin and the
//! plugin's children that has it is gone. A FIFO, because its read end tells of
//! that moment: the wait needs neither a thread nor a clock.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::Mode,
    unistd::mkfifo,
};
use tokio::{net::unix::pipe::Receiver, time::timeout};

use super::{
    error::CniError,
    exec::read_tail,
    record::{blocking, failure, remove_if_there},
};

/// The right to run plugins for an attachment. Dropping it leaves the right
/// with a plugin that has not ended yet, if there is one.
#[derive(Debug)]
pub(crate) struct RunLock {
    path: PathBuf,
    writer: File,
    reader: Receiver,
}

/// What an attempt found.
enum Attempt {
    Taken {
        writer: File,
        reader: File,
    },
    /// A plugin or another caller has it.
    Held {
        reader: File,
    },
    /// The file was removed or replaced in between.
    Stale,
}

impl RunLock {
    /// Takes the lock of the attachment `interface` of `sandbox`, after
    /// whatever run still goes on for it, within `limit`.
    pub(crate) async fn take(
        dir: &Path,
        sandbox: &str,
        interface: &str,
        limit: Duration,
    ) -> Result<Self, CniError> {
        // Neither name contains a ':'.
        let path = dir.join(format!("{sandbox}:{interface}.lock"));
        match timeout(limit, Self::take_in_time(&path, sandbox)).await {
            Ok(taken) => taken.map_err(failure("lock", &path)),
            Err(_) => Err(CniError::Busy {
                sandbox: sandbox.to_owned(),
                interface: interface.to_owned(),
                after: limit,
            }),
        }
    }

    async fn take_in_time(path: &Path, sandbox: &str) -> io::Result<Self> {
        loop {
            let attempt = {
                let path = path.to_owned();
                blocking(move || attempt(&path)).await?
            };
            match attempt {
                Attempt::Taken { writer, reader } => {
                    return Ok(Self {
                        path: path.to_owned(),
                        writer,
                        reader: Receiver::from_file(reader)?,
                    });
                }
                Attempt::Held { reader } => {
                    tracing::info!(sandbox, "waiting for an earlier CNI plugin run");
                    // Read, not only watched: a full pipe would hold it up.
                    let stderr = read_tail(Receiver::from_file(reader)?).await?;
                    tracing::info!(sandbox, stderr, "the earlier CNI plugin run ended");
                }
                Attempt::Stale => {}
            }
        }
    }

    /// For a plugin, which thereby takes part in holding the lock, and the end
    /// at which to read what it writes. There is no end of file: this holds
    /// the other end as well.
    pub(crate) fn stderr(&mut self) -> io::Result<(Stdio, &mut Receiver)> {
        Ok((self.writer.try_clone()?.into(), &mut self.reader))
    }

    /// Ends it when no plugin is left, and keeps the file for the next caller:
    /// DEL is to work on a full disk. Explicit, as a plugin may have started a
    /// service that holds on to its standard error.
    pub(crate) fn release(self) -> Result<(), CniError> {
        let failed = failure("unlock", &self.path);
        self.writer.unlock().map_err(failed)
    }

    /// Removes the file: who waits for the lock makes a new one.
    pub(crate) async fn unlink(&self) -> Result<(), CniError> {
        let path = self.path.clone();
        blocking(move || remove_if_there(&path))
            .await
            .map_err(failure("remove", &self.path))
    }
}

fn attempt(path: &Path) -> io::Result<Attempt> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    match mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let open = |options: &mut OpenOptions| {
        match options.custom_flags(libc::O_NONBLOCK).open(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) => match error.raw_os_error() {
                // Without a reader: it is another file than the one just opened.
                Some(libc::ENOENT | libc::ENXIO) => Ok(None),
                _ => Err(error),
            },
        }
    };
    // The reader first: from then on it hears of every writer's end.
    let Some(reader) = open(OpenOptions::new().read(true))? else {
        return Ok(Attempt::Stale);
    };
    let Some(writer) = open(OpenOptions::new().write(true))? else {
        return Ok(Attempt::Stale);
    };
    match writer.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Attempt::Held { reader }),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let inode = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let named = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Attempt::Stale),
        metadata => inode(metadata?),
    };
    if inode(writer.metadata()?) != named || inode(reader.metadata()?) != named {
        return Ok(Attempt::Stale);
    }
    // Plugins expect to be held up when they write faster than is read.
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(Attempt::Taken { writer, reader })
}
