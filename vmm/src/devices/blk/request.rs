//! One block request: header, data, status byte (virtio 1.2 §5.2.6).

use std::io;
use std::ops::Deref;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap};

use super::{Blk, RANGE_SECTORS_MAX, RANGES_MAX, SECTOR};
use crate::devices::iov::{Iov, split};

enum Refusal {
    /// The request is none that this device knows.
    Unsupported,
    /// It breaks the protocol or lies outside of the disk.
    Malformed,
    /// The host could not do it.
    Io(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Blk {
    /// Serves one request and returns how many bytes it wrote to the guest.
    pub(super) fn serve<M>(&self, chain: DescriptorChain<M>, mem: &GuestMemoryMmap) -> u32
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let Ok((readable, mut writable)) = split(chain, mem) else {
            return 0;
        };
        let Some(data_len) = writable.len().checked_sub(1) else {
            // No room for a status: nothing can be said.
            return 0;
        };
        let data = writable.take(data_len);
        let status_at = writable;
        let (status, written) = match self.execute(readable, data) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refusal::Malformed) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Refusal::Io(error)) => {
                let disk = String::from_utf8_lossy(&self.serial);
                // Debug level: a guest could fill the host's log with these.
                tracing::debug!(%disk, %error, "request failed");
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        status_at.fill_from(&[status as u8]);
        u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1)
    }

    fn execute(&self, mut readable: Iov<'_>, mut data: Iov<'_>) -> Result<usize, Refusal> {
        let header: [u8; 16] = readable.take_bytes().ok_or(Refusal::Malformed)?;
        let [kind, _] = words(&header, 0);
        let [low, high] = words(&header, 8);
        let sector = u64::from(low) | u64::from(high) << 32;
        match kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.place(sector, data.len())?;
                let count = data.len();
                self.backing.read(data, offset)?;
                Ok(count)
            }
            VIRTIO_BLK_T_OUT => {
                let offset = self.place(sector, readable.len())?;
                self.backing.write(readable, offset)?;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.backing.flush()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                data.truncate(self.serial.len());
                Ok(data.fill_from(&self.serial))
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if !self.read_only => {
                self.ranges(kind, readable)?;
                Ok(0)
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// The byte offset of a transfer that lies on the disk.
    fn place(&self, sector: u64, count: usize) -> Result<u64, Refusal> {
        let count = count as u64;
        let offset = sector.checked_mul(SECTOR).ok_or(Refusal::Malformed)?;
        if !count.is_multiple_of(SECTOR) || !self.backing.holds(offset, count) {
            return Err(Refusal::Malformed);
        }
        Ok(offset)
    }

    fn ranges(&self, kind: u32, mut list: Iov<'_>) -> Result<(), Refusal> {
        if list.len() > RANGES_MAX as usize * 16 || !list.len().is_multiple_of(16) {
            return Err(Refusal::Malformed);
        }
        while let Some(range) = list.take_bytes::<16>() {
            let [low, high] = words(&range, 0);
            let [sectors, flags] = words(&range, 8);
            let sector = u64::from(low) | u64::from(high) << 32;
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
            let offset = self.place(sector, count as usize)?;
            if unmap || kind == VIRTIO_BLK_T_DISCARD {
                self.backing.punch(offset, count)?;
            } else {
                self.backing.zero(offset, count)?;
            }
        }
        Ok(())
    }
}

/// Two little-endian words at `at`.
fn words(bytes: &[u8; 16], at: usize) -> [u32; 2] {
    [at, at + 4].map(|at| {
        let mut word = [0; 4];
        word.copy_from_slice(&bytes[at..at + 4]);
        u32::from_le_bytes(word)
    })
}
