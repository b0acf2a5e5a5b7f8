//! What a disk's sectors are made of.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};

use super::SECTOR;
use crate::devices::iov::Iov;

/// Layers start at multiples of this, the block size of EROFS.
const ALIGN: u64 = 4096;
/// Zeroes written at once to a device that cannot make them itself.
const ZEROES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("the slot has a disk already")]
    InUse,
    #[error("no file to back the disk")]
    NoFiles,
    #[error("file {index} of the disk is no regular file")]
    NotRegular { index: usize },
    #[error("what was sent to back the disk is no block device")]
    NotBlock,
    #[error("the block device is empty")]
    EmptyDevice,
    #[error("file {index} of the disk is empty")]
    EmptyFile { index: usize },
    #[error("file {index} of the disk is not open for {wanted}")]
    Mode { index: usize, wanted: &'static str },
    #[error("the disk's length of {len} bytes is no multiple of 4096")]
    Length { len: u64 },
    #[error("cannot set up the disk")]
    Setup(#[source] io::Error),
    #[error("file {index} of the disk")]
    Io { index: usize, source: io::Error },
}

/// A file that got shorter under a disk: what the guest believes to be there
/// has gone.
#[derive(Debug, thiserror::Error)]
#[error("file {index} of the disk has shrunk from {was} to {is} bytes")]
pub struct Shrunk {
    index: usize,
    was: u64,
    is: u64,
}

/// Why the host did not do what a request asks for.
#[derive(Debug)]
pub(super) enum BackingError {
    Io(io::Error),
    Shrunk(Shrunk),
}

impl From<io::Error> for BackingError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

pub(super) enum Backing {
    Empty,
    /// Read-only files one after another.
    Image(Vec<Extent>),
    /// One file, read-write.
    Disk {
        file: File,
        len: u64,
    },
    /// A block device of the host. One that goes away fails its requests; it
    /// is not the machine's own as files are.
    Device {
        file: File,
        len: u64,
        read_only: bool,
    },
}

pub(super) struct Extent {
    file: File,
    /// Where it begins on the disk.
    start: u64,
    file_len: u64,
    /// Its length on the disk: the file's, rounded up with zeroes.
    len: u64,
}

impl Backing {
    pub(super) fn image(files: Vec<File>) -> Result<Self, AttachError> {
        if files.is_empty() {
            return Err(AttachError::NoFiles);
        }
        let mut extents = Vec::with_capacity(files.len());
        let mut start = 0u64;
        for (index, file) in files.into_iter().enumerate() {
            let file_len = check(&file, index, false)?;
            let len = file_len.next_multiple_of(ALIGN);
            extents.push(Extent {
                file,
                start,
                file_len,
                len,
            });
            start += len;
        }
        Ok(Self::Image(extents))
    }

    pub(super) fn disk(file: File) -> Result<Self, AttachError> {
        let len = check(&file, 0, true)?;
        if !len.is_multiple_of(ALIGN) {
            return Err(AttachError::Length { len });
        }
        Ok(Self::Disk { file, len })
    }

    pub(super) fn device(mut file: File, read_only: bool) -> Result<Self, AttachError> {
        let failed = |source| AttachError::Io { index: 0, source };
        if !file
            .metadata()
            .map_err(failed)?
            .file_type()
            .is_block_device()
        {
            return Err(AttachError::NotBlock);
        }
        check_mode(&file, 0, !read_only)?;
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        match len / SECTOR * SECTOR {
            0 => Err(AttachError::EmptyDevice),
            len => Ok(Self::Device {
                file,
                len,
                read_only,
            }),
        }
    }

    pub(super) fn is_read_only(&self) -> bool {
        match self {
            Self::Empty | Self::Image(_) => true,
            Self::Disk { .. } => false,
            Self::Device { read_only, .. } => *read_only,
        }
    }

    /// Bytes; a multiple of the sector's.
    pub(super) fn capacity(&self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Image(extents) => extents.last().map_or(0, |last| last.start + last.len),
            Self::Disk { len, .. } | Self::Device { len, .. } => *len,
        }
    }

    /// Reads a range that lies on the disk.
    pub(super) fn read(&self, iov: Iov<'_>, offset: u64) -> Result<(), BackingError> {
        self.read_by(iov, offset, |iov, file, at| iov.read_exact_at(file, at))
    }

    /// The same if nobody has to wait for it, as [`Iov::read_cached_at`].
    pub(super) fn read_cached(&self, iov: Iov<'_>, offset: u64) -> Result<(), BackingError> {
        self.read_by(iov, offset, |iov, file, at| iov.read_cached_at(file, at))
    }

    fn read_by(
        &self,
        mut iov: Iov<'_>,
        mut offset: u64,
        read_at: impl Fn(Iov<'_>, &File, u64) -> io::Result<()>,
    ) -> Result<(), BackingError> {
        let read = |iov: Iov<'_>, index, file: &File, at, was| {
            read_at(iov, file, at).map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => shrunk(file, index, was, e),
                _ => e.into(),
            })
        };
        let extents = match self {
            Self::Empty => return Err(io::Error::from(io::ErrorKind::NotFound).into()),
            Self::Disk { file, len } => return read(iov, 0, file, offset, *len),
            Self::Device { file, .. } => return Ok(read_at(iov, file, offset)?),
            Self::Image(extents) => extents,
        };
        let first = extents.partition_point(|e| e.start + e.len <= offset);
        for (index, extent) in extents.iter().enumerate().skip(first) {
            if iov.is_empty() {
                break;
            }
            let within = offset - extent.start;
            let stored = extent.file_len.saturating_sub(within);
            let data = iov.take(usize::try_from(stored).unwrap_or(usize::MAX));
            offset += data.len() as u64;
            read(data, index, &extent.file, within, extent.file_len)?;

            let padding = iov.take((extent.start + extent.len - offset) as usize);
            offset += padding.len() as u64;
            padding.fill_zero();
        }
        Ok(())
    }

    /// The file of a disk that can be written, as long as it is whole: a
    /// write would make a shrunken one look so again. A device does not grow
    /// by being written.
    fn disk_file(&self) -> Result<&File, BackingError> {
        let (file, len) = match self {
            Self::Disk { file, len } => (file, len),
            Self::Device {
                file,
                read_only: false,
                ..
            } => return Ok(file),
            _ => return Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem).into()),
        };
        let is = file.metadata()?.len();
        if is < *len {
            let was = *len;
            return Err(BackingError::Shrunk(Shrunk { index: 0, was, is }));
        }
        Ok(file)
    }

    pub(super) fn write(&self, iov: Iov<'_>, offset: u64) -> Result<(), BackingError> {
        Ok(iov.write_all_at(self.disk_file()?, offset)?)
    }

    pub(super) fn flush(&self) -> Result<(), BackingError> {
        match self {
            _ if self.is_read_only() => Ok(()),
            _ => Ok(self.disk_file()?.sync_data()?),
        }
    }

    /// Gives the range back to the host; it reads as zeroes from now on.
    pub(super) fn punch(&self, offset: u64, count: u64) -> Result<(), BackingError> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate(flags, offset, count)
    }

    /// Zeroes the range and gives it back where the host can do so.
    pub(super) fn unmap(&self, offset: u64, count: u64) -> Result<(), BackingError> {
        match self.punch(offset, count) {
            Err(BackingError::Io(e)) if cannot(&e) => self.zero(offset, count),
            other => other,
        }
    }

    /// Zeroes the range and keeps it allocated where the host's file system
    /// can do so.
    pub(super) fn zero(&self, offset: u64, count: u64) -> Result<(), BackingError> {
        let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match (self.fallocate(flags, offset, count), self) {
            (Err(BackingError::Io(e)), Self::Device { .. }) if cannot(&e) => {
                self.write_zeroes(offset, count)
            }
            (Err(BackingError::Io(e)), _) if cannot(&e) => self.punch(offset, count),
            (other, _) => other,
        }
    }

    /// For a device with blocks larger than the guest's, of which the range is
    /// a part.
    fn write_zeroes(&self, mut offset: u64, mut count: u64) -> Result<(), BackingError> {
        let (file, zeroes) = (self.disk_file()?, [0; ZEROES]);
        while count > 0 {
            let part = count.min(ZEROES as u64);
            file.write_all_at(&zeroes[..part as usize], offset)?;
            (offset, count) = (offset + part, count - part);
        }
        Ok(())
    }

    fn fallocate(
        &self,
        flags: FallocateFlags,
        offset: u64,
        count: u64,
    ) -> Result<(), BackingError> {
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let count = i64::try_from(count).map_err(io::Error::other)?;
        if count == 0 {
            return Ok(());
        }
        Ok(fallocate(self.disk_file()?, flags, offset, count).map_err(io::Error::from)?)
    }
}

/// Whether the host cannot do it at all, or not with a range like this.
fn cannot(error: &io::Error) -> bool {
    [Errno::EOPNOTSUPP, Errno::EINVAL]
        .contains(&Errno::from_raw(error.raw_os_error().unwrap_or_default()))
}

/// What an early end of `file` means.
fn shrunk(file: &File, index: usize, was: u64, error: io::Error) -> BackingError {
    match file.metadata() {
        Ok(meta) if meta.len() < was => BackingError::Shrunk(Shrunk {
            index,
            was,
            is: meta.len(),
        }),
        _ => BackingError::Io(error),
    }
}

/// The length of a file fit to back a disk.
fn check(file: &File, index: usize, write: bool) -> Result<u64, AttachError> {
    let failed = |source| AttachError::Io { index, source };
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(AttachError::NotRegular { index });
    }
    check_mode(file, index, write)?;
    match meta.len() {
        0 => Err(AttachError::EmptyFile { index }),
        len => Ok(len),
    }
}

fn check_mode(file: &File, index: usize, write: bool) -> Result<(), AttachError> {
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(|errno| AttachError::Io {
        index,
        source: errno.into(),
    })?;
    let mode = OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE;
    if write && mode != OFlag::O_RDWR {
        return Err(AttachError::Mode {
            index,
            wanted: "reading and writing",
        });
    }
    if mode == OFlag::O_WRONLY || OFlag::from_bits_retain(flags).contains(OFlag::O_PATH) {
        return Err(AttachError::Mode {
            index,
            wanted: "reading",
        });
    }
    Ok(())
}
