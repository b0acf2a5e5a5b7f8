//! Guest buffers as scatter lists, so that the host's kernel reads and writes
//! guest memory without a copy in between.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd};

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice};

/// The kernel's UIO_MAXIOV.
const MAX_SLICES: usize = 1024;

/// A descriptor chain that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    #[error("a buffer of {len} bytes at {addr:#x} lies outside of guest memory")]
    Outside { addr: u64, len: u32 },
    #[error("a chain of more than {MAX_SLICES} buffers")]
    TooLong,
}

/// Pieces of guest memory, in order.
#[derive(Clone, Debug, Default)]
pub struct Iov<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

/// An [`Iov`] with the memory it lies in.
pub struct OwnedIov {
    iov: Iov<'static>,
    _mem: GuestMemoryMmap,
}

// SAFETY: the slices are pointers into mappings that live as long as `_mem`,
// whose regions are Send and Sync; guest memory may be accessed by any thread
// at any time, and is so by the guest, which is why all access is volatile.
unsafe impl Send for OwnedIov {}

impl OwnedIov {
    pub fn get(&self) -> Iov<'_> {
        self.iov.clone()
    }
}

/// Device-readable and device-writable buffers of `chain`.
pub fn split<'m, M>(
    chain: DescriptorChain<M>,
    mem: &'m GuestMemoryMmap,
) -> Result<(Iov<'m>, Iov<'m>), ChainError>
where
    M: Deref,
    M::Target: GuestMemory,
{
    let (mut readable, mut writable) = (Iov::default(), Iov::default());
    for descriptor in chain {
        let target = if descriptor.is_write_only() {
            &mut writable
        } else {
            &mut readable
        };
        target.push(mem, descriptor.addr(), descriptor.len())?;
    }
    Ok((readable, writable))
}

impl<'m> Iov<'m> {
    /// Memory of the host's own.
    pub fn of(bytes: &'m mut [u8]) -> Self {
        let mut iov = Self::default();
        if !bytes.is_empty() {
            iov.len = bytes.len();
            iov.slices.push(VolatileSlice::from(bytes));
        }
        iov
    }

    pub fn push(
        &mut self,
        mem: &'m GuestMemoryMmap,
        addr: GuestAddress,
        len: u32,
    ) -> Result<(), ChainError> {
        for slice in mem.get_slices(addr, len as usize) {
            let slice = slice.map_err(|_| ChainError::Outside { addr: addr.0, len })?;
            if self.slices.len() == MAX_SLICES {
                return Err(ChainError::TooLong);
            }
            self.len += slice.len();
            self.slices.push(slice);
        }
        Ok(())
    }

    /// Adds another list behind this one; false, and nothing added, where one
    /// call could not take both.
    pub fn extend(&mut self, more: &Self) -> bool {
        if self.slices.len() + more.slices.len() > MAX_SLICES {
            return false;
        }
        self.slices.extend_from_slice(&more.slices);
        self.len += more.len;
        true
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the first `count` bytes (or all there are) out of the list.
    #[must_use]
    pub fn take(&mut self, count: usize) -> Self {
        if count >= self.len {
            return std::mem::take(self);
        }
        let mut head = Self::default();
        let mut whole = 0;
        for slice in &self.slices {
            let left = count - head.len;
            if slice.len() <= left {
                head.len += slice.len();
                head.slices.push(*slice);
                whole += 1;
                continue;
            }
            if left > 0
                && let Ok((first, second)) = slice.split_at(left)
            {
                head.len += left;
                head.slices.push(first);
                self.slices[whole] = second;
            }
            break;
        }
        self.slices.drain(..whole);
        self.len -= head.len;
        head
    }

    /// Drops all but the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        *self = self.take(count);
    }

    /// Takes the next `N` bytes by value; `None` when there are fewer.
    pub fn take_bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.len < N {
            return None;
        }
        let mut bytes = [0; N];
        self.take(N).copy_to(&mut bytes);
        Some(bytes)
    }

    /// Copies `bytes` to the front of the list, as far as it reaches.
    pub fn fill_from(&self, bytes: &[u8]) -> usize {
        let mut at = 0;
        for slice in &self.slices {
            if at == bytes.len() {
                break;
            }
            let count = slice.len().min(bytes.len() - at);
            slice.copy_from(&bytes[at..at + count]);
            at += count;
        }
        at
    }

    /// Copies the front of the list out, as far as `bytes` reaches.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut at = 0;
        for slice in &self.slices {
            at += slice.copy_to(&mut bytes[at..]);
        }
        at
    }

    pub fn fill_zero(&self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        for slice in &self.slices {
            let mut rest = *slice;
            while !rest.is_empty() {
                let count = rest.len().min(ZEROES.len());
                rest.copy_from(&ZEROES[..count]);
                match rest.offset(count) {
                    Ok(next) => rest = next,
                    Err(_) => break,
                }
            }
        }
    }

    /// Fills the list from `file` at `offset`; an end of the file before that
    /// is an error.
    pub fn read_exact_at(self, file: impl AsFd, offset: u64) -> io::Result<()> {
        let fd = file.as_fd().as_raw_fd();
        self.transfer(offset, io::ErrorKind::UnexpectedEof, |iov, count, at| {
            // SAFETY: every iovec lies in guest memory that `self` borrows and
            // that is only ever accessed as volatile.
            unsafe { libc::preadv2(fd, iov, count, at, 0) }
        })
    }

    /// As [`Iov::read_exact_at`] where the host has all of it in its page
    /// cache; `WouldBlock` where it would have to wait for a disk, `Unsupported`
    /// where its file system cannot tell.
    pub fn read_cached_at(self, file: impl AsFd, offset: u64) -> io::Result<()> {
        let fd = file.as_fd().as_raw_fd();
        self.transfer(offset, io::ErrorKind::UnexpectedEof, |iov, count, at| {
            // SAFETY: every iovec lies in guest memory that `self` borrows and
            // that is only ever accessed as volatile.
            unsafe { libc::preadv2(fd, iov, count, at, libc::RWF_NOWAIT) }
        })
    }

    /// Writes the whole list to `file` at `offset`.
    pub fn write_all_at(self, file: impl AsFd, offset: u64) -> io::Result<()> {
        let fd = file.as_fd().as_raw_fd();
        self.transfer(offset, io::ErrorKind::WriteZero, |iov, count, at| {
            // SAFETY: every iovec lies in guest memory that `self` borrows and
            // that is only ever accessed as volatile.
            unsafe { libc::pwritev2(fd, iov, count, at, 0) }
        })
    }

    /// Fills the list from `file` at `offset` as far as the file goes; the
    /// bytes read. What was read before a failure counts.
    pub fn read_at(self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        let fd = file.as_fd().as_raw_fd();
        self.transfer_some(offset, |iov, count, at| {
            // SAFETY: every iovec lies in guest memory that `self` borrows and
            // that is only ever accessed as volatile.
            unsafe { libc::preadv2(fd, iov, count, at, 0) }
        })
    }

    /// Writes the list to `file` at `offset` as far as it takes it, with
    /// `flags` of pwritev2(2); the bytes written. What was written before a
    /// failure counts.
    pub fn write_at(self, file: impl AsFd, offset: u64, flags: libc::c_int) -> io::Result<usize> {
        let fd = file.as_fd().as_raw_fd();
        self.transfer_some(offset, |iov, count, at| {
            // SAFETY: every iovec lies in guest memory that `self` borrows and
            // that is only ever accessed as volatile.
            unsafe { libc::pwritev2(fd, iov, count, at, flags) }
        })
    }

    /// Calls until all of the list was moved or a call moves nothing.
    fn transfer_some(
        mut self,
        mut offset: u64,
        call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
    ) -> io::Result<usize> {
        let mut moved = 0;
        while !self.is_empty() {
            let at = libc::off_t::try_from(offset)
                .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
            match self.call(|iov, count| call(iov, count, at)) {
                Ok(0) => break,
                Ok(done) => {
                    moved += done;
                    offset = offset.saturating_add(done as u64);
                    drop(self.take(done));
                }
                Err(error) if moved == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(moved)
    }

    /// Calls until all of the list was moved; `end` when a call moves nothing.
    fn transfer(
        mut self,
        mut offset: u64,
        end: io::ErrorKind,
        call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
    ) -> io::Result<()> {
        while !self.is_empty() {
            let done = self.call(|iov, count| call(iov, count, signed(offset)))?;
            if done == 0 {
                return Err(end.into());
            }
            offset += done as u64;
            drop(self.take(done));
        }
        Ok(())
    }

    /// One `readv`: a packet.
    pub fn read_from(&self, file: impl AsFd) -> io::Result<usize> {
        self.call(|iov, count| {
            // SAFETY: every iovec lies in guest memory that `self` borrows and
            // that is only ever accessed as volatile.
            unsafe { libc::readv(file.as_fd().as_raw_fd(), iov, count) }
        })
    }

    /// One `writev`: a packet.
    pub fn write_to(&self, file: impl AsFd) -> io::Result<usize> {
        self.call(|iov, count| {
            // SAFETY: every iovec lies in guest memory that `self` borrows and
            // that is only ever accessed as volatile.
            unsafe { libc::writev(file.as_fd().as_raw_fd(), iov, count) }
        })
    }

    /// One `sendmsg` to a stream socket: neither blocks nor raises SIGPIPE.
    pub fn send(&self, socket: impl AsFd) -> io::Result<usize> {
        const FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        self.call(|iov, count| {
            let message = message(iov, count);
            // SAFETY: every iovec lies in guest memory that `self` borrows and
            // that is only ever accessed as volatile; `message` outlives the
            // call.
            unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &message, FLAGS) }
        })
    }

    /// One `recvmsg` from a stream socket that does not block.
    pub fn receive(&self, socket: impl AsFd) -> io::Result<usize> {
        self.call(|iov, count| {
            let mut message = message(iov, count);
            // SAFETY: as in `send`.
            unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
        })
    }

    /// The same list for another thread: it keeps the mappings of `mem` by
    /// itself. `None` for a list of some other memory.
    pub fn into_owned(self, mem: &'m GuestMemoryMmap) -> Option<OwnedIov> {
        let inside = |slice: &VolatileSlice<'_>| {
            let start = slice.ptr_guard().as_ptr() as usize;
            mem.iter().any(|region| {
                let base = region.as_ptr() as usize;
                start >= base && start - base + slice.len() <= region.size()
            })
        };
        if !self.slices.iter().all(inside) {
            return None;
        }
        // SAFETY: only the lifetime changes. Each slice lies in a mapping of a
        // region of `mem`, as was just seen; the copy of `mem` beside it holds
        // all of these regions until after the last use of the slices, which
        // never leave the `OwnedIov` with a longer life than its own.
        let iov = unsafe { std::mem::transmute::<Iov<'m>, Iov<'static>>(self) };
        Some(OwnedIov {
            iov,
            _mem: mem.clone(),
        })
    }

    fn call(&self, call: impl Fn(*const libc::iovec, libc::c_int) -> isize) -> io::Result<usize> {
        let guards: Vec<_> = self
            .slices
            .iter()
            .map(VolatileSlice::ptr_guard_mut)
            .collect();
        let iovecs: Vec<_> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        // At most MAX_SLICES, by `push`.
        let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
        loop {
            let done = call(iovecs.as_ptr(), count);
            if let Ok(done) = usize::try_from(done) {
                return Ok(done);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

fn message(iov: *const libc::iovec, count: libc::c_int) -> libc::msghdr {
    // SAFETY: all zeroes is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov.cast_mut();
    message.msg_iovlen = count as usize;
    message
}

/// Offsets are checked against a device's size, which is that of files.
fn signed(offset: u64) -> libc::off_t {
    libc::off_t::try_from(offset).unwrap_or(libc::off_t::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap()
    }

    fn scattered(mem: &GuestMemoryMmap) -> Iov<'_> {
        let mut iov = Iov::default();
        for (addr, len) in [(0x100, 3), (0x200, 5), (0x300, 2)] {
            iov.push(mem, GuestAddress(addr), len).unwrap();
        }
        iov
    }

    #[test]
    fn a_list_is_taken_apart_at_any_byte() {
        let mem = memory();
        for cut in 0..=12 {
            let mut rest = scattered(&mem);
            let head = rest.take(cut);
            assert_eq!(head.len(), cut.min(10));
            assert_eq!(rest.len(), 10 - cut.min(10));
            assert_eq!(head.fill_from(b"abcdefghij"), cut.min(10));
            assert_eq!(rest.fill_from(&b"abcdefghij"[cut.min(10)..]), rest.len());
            let bytes: [u8; 10] = scattered(&mem).take_bytes().unwrap();
            assert_eq!(&bytes, b"abcdefghij");
        }
    }

    #[test]
    fn files_are_read_and_written_in_place() {
        let mem = memory();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"__0123456789").unwrap();
        scattered(&mem).read_exact_at(&file, 2).unwrap();
        let mut middle = [0; 5];
        mem.read_slice(&mut middle, GuestAddress(0x200)).unwrap();
        assert_eq!(&middle, b"34567");
        scattered(&mem).write_all_at(&file, 12).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 22);
        let error = scattered(&mem).read_exact_at(&file, 15).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_list_outlives_the_memory_it_was_made_of() {
        let mem = memory();
        let other = memory();
        assert!(scattered(&mem).into_owned(&other).is_none());
        scattered(&mem).fill_from(b"abcdefghij");
        let owned = scattered(&mem).into_owned(&mem).unwrap();
        drop(mem);
        let bytes = std::thread::spawn(move || owned.get().take_bytes::<10>());
        assert_eq!(&bytes.join().unwrap().unwrap(), b"abcdefghij");
    }

    #[test]
    fn buffers_outside_of_memory_are_refused() {
        let mem = memory();
        let mut iov = Iov::default();
        let error = iov.push(&mem, GuestAddress(0x3fff), 2).unwrap_err();
        assert!(matches!(error, ChainError::Outside { addr: 0x3fff, .. }));
    }
}
