//! Layers unpacked by processes that are not trusted: `unpacker-client` says
//! why there are two. This is what stands between them.
//!
//! ```text
//!              ┌ thread, parent ┐             ┌ thread, parent ─────────┐
//! compressed ─▶│ feeds          │─▶ unpacker ─▶ counts, hashes, passes on │─▶ unpacker ─▶ image
//!              └────────────────┘             └─────────────────────────┘
//! ```

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Once,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, ScopedJoinHandle},
};

use rustix::{
    fs::{OFlags, fcntl_setfl},
    pipe::{PipeFlags, fcntl_setpipe_size, pipe_with},
};
use sha2::{Digest as _, Sha256};
use unpacker_client::{
    Compression, Done, Failure, Fault, Job, Limits, Missing, NO_PROGRESS, Parent, Process, Stop,
    Task, Unpacker, Watch, Written, image_uuid, parent, stopper,
};

use crate::{
    digest::Digest,
    error::{ErrorKind, LayerError},
};

/// Bytes that wait in a pipe: fewer would be more switches between processes.
const PIPE: usize = 256 * 1024;

/// Size of a block of an image.
const BLOCK: u64 = 4096;

/// A layer before it is unpacked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed<'a> {
    pub(crate) digest: &'a Digest,
    pub(crate) size: u64,
    pub(crate) declared: Compression,
}

/// A layer whose image is written.
#[derive(Clone, Debug)]
pub(crate) struct Unpacked {
    pub(crate) diff_id: Digest,
    pub(crate) written: Written,
}

/// What all that is unpacked has in common.
#[derive(Clone, Debug)]
pub(crate) struct Unpacking {
    pub(crate) unpacker: Unpacker,
    pub(crate) limits: Limits,
}

impl Unpacking {
    /// Reads all of `compressed` that `packed` has and makes its image in
    /// `image`, which is empty. Drops `enough` when no more of `compressed` is
    /// of use: its next read may fail then. No process is left, whatever comes
    /// of it.
    ///
    /// # Errors
    /// If `compressed` fails it knows why, and the failure here is of no use.
    pub(crate) fn layer(
        &self,
        packed: Packed<'_>,
        compressed: &mut (impl Read + Send),
        enough: impl Send,
        image: &File,
        stop: &Stop,
    ) -> Result<Unpacked, Failure> {
        let between = &Between {
            packed,
            limits: &self.limits,
            unpacker: &self.unpacker,
            watch: Watch::new(stop, NO_PROGRESS),
            fed: AtomicU64::new(0),
        };
        let (whole, is_whole) = mpsc::sync_channel(1);
        let to_first = Pipe::to_unpacker()?;
        let from_first = Pipe::from_unpacker()?;
        let second = Second {
            from: from_first.ours,
            to: Pipe::to_unpacker()?,
            image,
        };
        let (first, second) = thread::scope(|scope| {
            let first = parent(scope, move |parent| {
                between.decompress(parent, compressed, to_first, from_first.theirs)?;
                // If nobody listens any more the second one's failure tells.
                Ok(whole.send(()).is_ok())
            });
            let second = parent(scope, move |parent| {
                let passed_on = between.pass_on(parent, second);
                // The registry may be silent, and the first one be gone.
                drop(enough);
                let (process, diff_id) = passed_on?;
                // Nothing comes any more also when it has died.
                is_whole.recv().map_err(|_| Failure::Unread)?;
                between.finish(process, diff_id)
            });
            (joined(first), joined(second))
        });
        let unpacked = match (first, second) {
            (Err(Failure::Stopped), _) => return Err(Failure::Stopped),
            // The first one's end is what the second one waits for.
            (Err(failure), Err(Failure::Unread)) => return Err(failure),
            (_, second) => second?,
        };
        check_len(image, unpacked.written.erofs_len)?;
        Ok(unpacked)
    }

    /// Makes what goes on top of `layers`, lowest first, in `image`, which is
    /// empty; gives its length. None: they need nothing. `chain_id` is theirs.
    ///
    /// # Errors
    /// See [`Failure`].
    pub(crate) fn directories(
        &self,
        chain_id: &Digest,
        layers: &[File],
        image: &File,
    ) -> Result<Option<u64>, Failure> {
        // Kept to the end: nobody stops this.
        let (_stopper, stop) = stopper().map_err(Failure::Pipe)?;
        let uuid = image_uuid(&Sha256::digest(chain_id.as_str()).into());
        let fds: Vec<_> = [image].into_iter().chain(layers).map(AsFd::as_fd).collect();
        let job = Job {
            unpacker: &self.unpacker,
            name: chain_id.as_str(),
            task: Task::Directories {
                limits: self.limits,
                uuid,
            },
            fds: &fds,
        };
        let watch = Watch::new(&stop, NO_PROGRESS);
        let done = thread::scope(|scope| {
            joined(parent(scope, |parent| {
                start(parent, &job, &watch)?.wait(&watch, NO_PROGRESS)
            }))
        });
        let len = match done? {
            Done::Directories(len) => len,
            other => return Err(out_of_turn(&other)),
        };
        if let Some(len) = len {
            check_len(image, len)?;
        }
        Ok(len)
    }
}

/// Whether an image is as long as is told, and can be one.
fn check_len(image: &File, told: u64) -> Result<(), Failure> {
    let len = image.metadata().map_err(Failure::Pipe)?.len();
    if len == told && len > 0 && len.is_multiple_of(BLOCK) {
        return Ok(());
    }
    let text = format!("an image of {len} bytes is said to have {told}");
    Err(Failure::Nonsense(text))
}

/// What the second unpacker of a layer has to do with.
struct Second<'a> {
    /// Of the first one.
    from: OwnedFd,
    to: Pipe,
    image: &'a File,
}

/// What the two threads of a layer share.
struct Between<'a> {
    packed: Packed<'a>,
    limits: &'a Limits,
    unpacker: &'a Unpacker,
    watch: Watch<'a>,
    /// Bytes that the first unpacker was given.
    fed: AtomicU64,
}

impl Between<'_> {
    fn job<'j>(&'j self, task: Task, fds: &'j [BorrowedFd<'j>]) -> Job<'j> {
        Job {
            unpacker: self.unpacker,
            name: self.packed.digest.as_str(),
            task,
            fds,
        }
    }

    /// The first unpacker's whole life.
    fn decompress(
        &self,
        parent: Parent,
        compressed: &mut impl Read,
        layer: Pipe,
        archive: OwnedFd,
    ) -> Result<(), Failure> {
        let task = Task::Decompress {
            declared: self.packed.declared,
            max_bytes: self.limits.max_uncompressed_bytes,
        };
        let fds = [layer.theirs.as_fd(), archive.as_fd()];
        let process = start(parent, &self.job(task, &fds), &self.watch)?;
        // Its own alone now: when it ends, so do they.
        drop((layer.theirs, archive));
        let mut piece = vec![0; PIPE];
        loop {
            let len = match compressed.read(&mut piece) {
                Ok(0) => break,
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Err(self.cause(process, layer.ours)),
            };
            // Before it can come out again.
            self.fed.fetch_add(len as u64, Ordering::SeqCst);
            match self.watch.write(&layer.ours, &piece[..len]) {
                Err(Failure::Unread) => break,
                written => written?,
            }
        }
        drop(layer.ours);
        match process.wait(&self.watch, NO_PROGRESS)? {
            Done::Decompressed => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }

    /// Why the first unpacker gets no more: it has failed itself, or the cause
    /// is somebody else's, and then what it says of its input's end is not.
    fn cause(&self, process: Process, feed: OwnedFd) -> Failure {
        let first = process.has_spoken();
        drop(feed);
        match process.wait(&self.watch, NO_PROGRESS) {
            Err(failure @ (Failure::Died { .. } | Failure::Stopped)) => failure,
            Err(failure) if first => failure,
            _ => Failure::Unread,
        }
    }

    /// Starts the second unpacker and gives it all that the first one gives,
    /// whose digest is the second value.
    fn pass_on(&self, parent: Parent, second: Second<'_>) -> Result<(Process, [u8; 32]), Failure> {
        let task = Task::Write {
            limits: *self.limits,
            received: self.packed.size,
        };
        let fds = [second.to.theirs.as_fd(), second.image.as_fd()];
        let process = start(parent, &self.job(task, &fds), &self.watch)?;
        drop(second.to.theirs);
        let mut piece = vec![0; PIPE];
        let mut hasher = Sha256::new();
        let mut produced = 0;
        loop {
            let passed = self.watch.read(&second.from, &process, &mut piece);
            let passed = passed.and_then(|len| {
                produced += len as u64;
                self.limits
                    .check(self.fed.load(Ordering::SeqCst), produced)?;
                hasher.update(&piece[..len]);
                self.watch.write(&second.to.ours, &piece[..len])?;
                Ok(len)
            });
            match passed {
                Ok(0) => return Ok((process, hasher.finalize().into())),
                Ok(_) => {}
                Err(Failure::Unread) => {
                    // It says why; that it is done is no reason.
                    process.wait(&self.watch, NO_PROGRESS)?;
                    let text = "it is done before the archive's end".to_owned();
                    return Err(Failure::Nonsense(text));
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Has the second unpacker finish the image of what it was given.
    fn finish(&self, process: Process, diff_id: [u8; 32]) -> Result<Unpacked, Failure> {
        process.finish(image_uuid(&diff_id))?;
        match process.wait(&self.watch, NO_PROGRESS)? {
            Done::Written(written) => Ok(Unpacked {
                diff_id: Digest::from_sha256(&diff_id),
                written,
            }),
            other => Err(out_of_turn(&other)),
        }
    }
}

fn out_of_turn(done: &Done) -> Failure {
    Failure::Nonsense(format!("{done:?}"))
}

/// Starts an unpacker; the first that the node's kernel cannot confine in full
/// is told of, beside what the daemon knows of its node.
fn start(parent: Parent, job: &Job<'_>, watch: &Watch<'_>) -> Result<Process, Failure> {
    static TOLD: Once = Once::new();
    let process = Process::start(parent, job, watch)?;
    if !process.missing().is_empty() {
        TOLD.call_once(|| {
            let missing: Vec<String> = process.missing().iter().map(Missing::to_string).collect();
            tracing::info!(
                missing = missing.join(", "),
                "the node's kernel lacks a part of the jail in which image layers are unpacked"
            );
        });
    }
    Ok(process)
}

/// A pipe between the daemon and an unpacker. The daemon's end does not block.
struct Pipe {
    ours: OwnedFd,
    theirs: OwnedFd,
}

impl Pipe {
    fn to_unpacker() -> Result<Self, Failure> {
        let (theirs, ours) = pipe()?;
        Self::new(ours, theirs)
    }

    fn from_unpacker() -> Result<Self, Failure> {
        let (ours, theirs) = pipe()?;
        Self::new(ours, theirs)
    }

    fn new(ours: OwnedFd, theirs: OwnedFd) -> Result<Self, Failure> {
        fcntl_setfl(&ours, OFlags::NONBLOCK).map_err(failed)?;
        Ok(Self { ours, theirs })
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Failure> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(failed)?;
    match fcntl_setpipe_size(&writer, PIPE) {
        // A smaller one does too.
        Ok(_) | Err(rustix::io::Errno::PERM) => Ok((reader, writer)),
        Err(error) => Err(failed(error)),
    }
}

fn failed(error: rustix::io::Errno) -> Failure {
    Failure::Pipe(error.into())
}

fn joined<T>(thread: io::Result<ScopedJoinHandle<'_, Result<T, Failure>>>) -> Result<T, Failure> {
    match thread.map_err(Failure::Pipe)?.join() {
        Ok(result) => result,
        Err(_) => Err(Failure::Pipe(io::Error::other("a thread has panicked"))),
    }
}

impl From<Failure> for LayerError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Stopped => Self::Stopped,
            Failure::Failed { fault, reason } => Self::Content {
                kind: match fault {
                    Fault::Layer => ErrorKind::Corrupt,
                    Fault::Resources => ErrorKind::ResourceExhausted,
                    Fault::Node => ErrorKind::Internal,
                    Fault::Unconfined => ErrorKind::Unconfined,
                },
                reason,
            },
            Failure::Unconfined { reason } => Self::Content {
                kind: ErrorKind::Unconfined,
                reason: format!(
                    "{reason}: `confinement: required` unpacks no layer with less than all"
                ),
            },
            Failure::Limit(limit) => Self::Content {
                kind: ErrorKind::ResourceExhausted,
                reason: limit.to_string(),
            },
            failure => Self::Unpacker {
                reason: failure.to_string(),
            },
        }
    }
}
