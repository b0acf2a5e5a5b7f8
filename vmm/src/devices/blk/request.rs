//! One block request: header, data, status byte (virtio 1.2 §5.2.6).

use std::ops::Deref;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap};

use super::backing::{Backing, BackingError, Shrunk};
use super::{RANGE_SECTORS_MAX, RANGES_MAX, SECTOR, State, unsupported};
use crate::devices::iov::{Iov, OwnedIov, split};

#[derive(Debug)]
pub(super) enum Refusal {
    /// The request is none that this device knows.
    Unsupported,
    /// It breaks the protocol or lies outside of the disk.
    Malformed,
    /// The host could not do it.
    Host(BackingError),
}

impl From<BackingError> for Refusal {
    fn from(error: BackingError) -> Self {
        Self::Host(error)
    }
}

/// What a request asks for; places lie on the disk.
#[derive(Debug)]
pub(super) enum Op {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    Identify,
    Clear(Vec<Range>),
}

/// A part of the disk that shall read as zeroes.
#[derive(Debug)]
pub(super) struct Range {
    offset: u64,
    count: u64,
    clear: Clear,
}

/// What clearing a range must come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clear {
    /// The range is given back, where that can be done.
    Discard,
    /// It reads as zeroes, given back where that can be done.
    Unmap,
    /// It reads as zeroes and stays allocated.
    Keep,
}

impl Range {
    pub(super) fn bytes(&self) -> u64 {
        self.count
    }
}

impl Op {
    /// Whether a flush that comes later has to cover it.
    pub(super) fn changes_disk(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Clear(_))
    }
}

/// A chain that may be a request.
pub(super) struct Request<'m> {
    pub(super) op: Result<Op, Refusal>,
    /// What a read fills or a write takes.
    pub(super) data: Iov<'m>,
    status: Iov<'m>,
}

/// The same for another thread.
pub(super) struct OwnedRequest {
    op: Op,
    data: OwnedIov,
    status: OwnedIov,
}

/// How a request ended.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Bytes written to the guest, the status included.
    pub(super) written: u32,
    /// The disk cannot be served any more.
    pub(super) failure: Option<Shrunk>,
}

impl<'m> Request<'m> {
    /// `None` for a chain in which there is no room to say anything.
    pub(super) fn parse<M>(
        chain: DescriptorChain<M>,
        mem: &'m GuestMemoryMmap,
        state: &State,
    ) -> Option<Self>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let (mut readable, mut writable) = split(chain, mem).ok()?;
        let room = writable.len().checked_sub(1)?;
        let mut request = Self {
            op: Err(Refusal::Malformed),
            data: writable.take(room),
            status: writable,
        };
        request.op = match readable.take_bytes::<16>() {
            Some(header) => request.understand(&header, readable, state),
            None => Err(Refusal::Malformed),
        };
        Some(request)
    }

    fn understand(
        &mut self,
        header: &[u8; 16],
        readable: Iov<'m>,
        state: &State,
    ) -> Result<Op, Refusal> {
        let [kind, _] = words(header, 0);
        let sector = u64::from_le_bytes(long(header, 8));
        match kind {
            VIRTIO_BLK_T_IN => Ok(Op::Read {
                offset: state.place(sector, self.data.len() as u64)?,
            }),
            VIRTIO_BLK_T_OUT if state.read_only => Err(Refusal::Malformed),
            VIRTIO_BLK_T_OUT => {
                self.data = readable;
                Ok(Op::Write {
                    offset: state.place(sector, self.data.len() as u64)?,
                })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Op::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Op::Identify),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if !state.read_only => {
                Ok(Op::Clear(ranges(kind, readable, state)?))
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Does what it asks for, if it takes waiting for the host as well.
    pub(super) fn execute(&self, op: &Op, backing: &Backing, state: &State) -> Outcome {
        execute(op, self.data.clone(), &self.status, backing, state)
    }

    /// Tells the guest how it went; `done` is the number of bytes read.
    pub(super) fn finish(&self, done: Result<usize, Refusal>, state: &State) -> Outcome {
        finish(&self.status, done, state)
    }

    pub(super) fn into_owned(self, op: Op, mem: &'m GuestMemoryMmap) -> Option<OwnedRequest> {
        Some(OwnedRequest {
            op,
            data: self.data.into_owned(mem)?,
            status: self.status.into_owned(mem)?,
        })
    }
}

impl OwnedRequest {
    pub(super) fn op(&self) -> &Op {
        &self.op
    }

    pub(super) fn execute(&self, backing: &Backing, state: &State) -> Outcome {
        let (data, status) = (self.data.get(), self.status.get());
        execute(&self.op, data, &status, backing, state)
    }
}

fn execute(op: &Op, data: Iov<'_>, status: &Iov<'_>, backing: &Backing, state: &State) -> Outcome {
    let done = match op {
        Op::Read { offset } => {
            let count = data.len();
            backing.read(data, *offset).map(|()| count)
        }
        Op::Write { offset } => backing.write(data, *offset).map(|()| 0),
        Op::Flush => backing.flush().map(|()| 0),
        Op::Identify => Ok(data.fill_from(&state.serial)),
        Op::Clear(ranges) => ranges.iter().try_fold(0, |_, range| {
            let clear = match range.clear {
                Clear::Discard => Backing::punch,
                Clear::Unmap => Backing::unmap,
                Clear::Keep => Backing::zero,
            };
            clear(backing, range.offset, range.count).map(|()| 0)
        }),
    };
    finish(status, done.map_err(Refusal::from), state)
}

fn finish(status: &Iov<'_>, done: Result<usize, Refusal>, state: &State) -> Outcome {
    let mut failure = None;
    let (code, count) = match done {
        Ok(count) => (VIRTIO_BLK_S_OK, count),
        Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        Err(Refusal::Malformed) => (VIRTIO_BLK_S_IOERR, 0),
        Err(Refusal::Host(BackingError::Shrunk(shrunk))) => {
            failure = Some(shrunk);
            (VIRTIO_BLK_S_IOERR, 0)
        }
        // A device that cannot discard: its driver asks no more.
        Err(Refusal::Host(BackingError::Io(error))) if unsupported(&error) => {
            (VIRTIO_BLK_S_UNSUPP, 0)
        }
        Err(Refusal::Host(BackingError::Io(error))) => {
            let disk = String::from_utf8_lossy(&state.serial);
            // Debug level: a guest could fill the host's log with these.
            tracing::debug!(%disk, %error, "request failed");
            (VIRTIO_BLK_S_IOERR, 0)
        }
    };
    status.fill_from(&[code as u8]);
    Outcome {
        written: u32::try_from(count).unwrap_or(u32::MAX).saturating_add(1),
        failure,
    }
}

impl State {
    /// The byte offset of a transfer that lies on the disk.
    fn place(&self, sector: u64, count: u64) -> Result<u64, Refusal> {
        let offset = sector.checked_mul(SECTOR).ok_or(Refusal::Malformed)?;
        let end = offset.checked_add(count).ok_or(Refusal::Malformed)?;
        if !count.is_multiple_of(SECTOR) || end > self.capacity {
            return Err(Refusal::Malformed);
        }
        Ok(offset)
    }
}

fn ranges(kind: u32, mut list: Iov<'_>, state: &State) -> Result<Vec<Range>, Refusal> {
    if list.len() > RANGES_MAX as usize * 16 || !list.len().is_multiple_of(16) {
        return Err(Refusal::Malformed);
    }
    let mut ranges = Vec::with_capacity(list.len() / 16);
    while let Some(range) = list.take_bytes::<16>() {
        let sector = u64::from_le_bytes(long(&range, 0));
        let [sectors, flags] = words(&range, 8);
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0
            || (kind == VIRTIO_BLK_T_DISCARD && unmap)
        {
            return Err(Refusal::Unsupported);
        }
        if sectors > RANGE_SECTORS_MAX {
            return Err(Refusal::Malformed);
        }
        let count = u64::from(sectors) * SECTOR;
        ranges.push(Range {
            offset: state.place(sector, count)?,
            count,
            clear: match (kind, unmap) {
                (VIRTIO_BLK_T_DISCARD, _) => Clear::Discard,
                (_, true) => Clear::Unmap,
                (_, false) => Clear::Keep,
            },
        });
    }
    Ok(ranges)
}

/// Two little-endian words at `at`.
fn words(bytes: &[u8; 16], at: usize) -> [u32; 2] {
    let both = u64::from_le_bytes(long(bytes, at));
    [both as u32, (both >> 32) as u32]
}

fn long(bytes: &[u8; 16], at: usize) -> [u8; 8] {
    let mut long = [0; 8];
    long.copy_from_slice(&bytes[at..at + 8]);
    long
}
