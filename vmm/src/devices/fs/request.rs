//! What the monitor has to understand of a FUSE request (`fuse.h` of Linux): its
//! header, and the arguments of those that it does not pass on.

use virtiofsd::fuse::Opcode;

use crate::devices::iov::Iov;
use crate::files::channel::IN_HEADER_LEN;

/// `struct fuse_read_in`, `fuse_write_in`, `fuse_release_in`: the handle is
/// first in each.
const READ_IN_LEN: usize = 40;
const WRITE_IN_LEN: usize = 40;

/// `FUSE_WRITE_CACHE`: the guest writes back what it has cached.
const WRITE_CACHE: u32 = 1;

/// `struct fuse_in_header`, copied out of the guest's memory once.
#[derive(Clone, Copy)]
pub(super) struct Header(pub(super) [u8; IN_HEADER_LEN]);

impl Header {
    pub(super) fn opcode(&self) -> u32 {
        u32_at(&self.0, 4)
    }

    pub(super) fn is(&self, opcode: Opcode) -> bool {
        self.opcode() == opcode as u32
    }

    /// Whether a request is one without a reply.
    pub(super) fn is_silent(&self) -> bool {
        [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt]
            .into_iter()
            .any(|silent| self.is(silent))
    }

    /// Whether its arguments are a `struct fuse_read_in` whose size the guest
    /// lets the file system make smaller.
    pub(super) fn lists_a_directory(&self) -> bool {
        self.is(Opcode::Readdir) || self.is(Opcode::Readdirplus)
    }
}

pub(super) struct ReadIn {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) size: usize,
}

impl ReadIn {
    pub(super) fn take(readable: &mut Iov<'_>) -> Option<Self> {
        let bytes = readable.take_bytes::<READ_IN_LEN>()?;
        Some(Self {
            handle: u64_at(&bytes, 0),
            offset: u64_at(&bytes, 8),
            size: u32_at(&bytes, 16) as usize,
        })
    }
}

pub(super) struct WriteIn {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) size: usize,
    /// At the end of the file, wherever that is by now.
    pub(super) append: bool,
}

impl WriteIn {
    pub(super) fn take(readable: &mut Iov<'_>) -> Option<Self> {
        let bytes = readable.take_bytes::<WRITE_IN_LEN>()?;
        let (write_flags, flags) = (u32_at(&bytes, 20), u32_at(&bytes, 32));
        let cached = write_flags & WRITE_CACHE != 0;
        Some(Self {
            handle: u64_at(&bytes, 0),
            offset: u64_at(&bytes, 8),
            size: u32_at(&bytes, 16) as usize,
            append: !cached && flags & libc::O_APPEND.cast_unsigned() != 0,
        })
    }
}

/// Where `struct fuse_read_in` has its size, in a whole request.
pub(super) const LIST_SIZE_AT: usize = IN_HEADER_LEN + 16;

/// Of fixed places in arrays.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}
