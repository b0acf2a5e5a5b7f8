//! The database's file, its blocks taken whenever it grows: what is in it can
//! be changed and removed on a full disk, and growth that fails leaves it as
//! it was.

use std::fs::File;
use std::io;
use std::ops::Bound;

use nix::fcntl::{FallocateFlags, fallocate};
use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend};

#[derive(Debug)]
pub(super) struct ReservedFile {
    inner: FileBackend,
    file: File,
}

impl ReservedFile {
    pub(super) fn new(file: File) -> Result<Self, DatabaseError> {
        Ok(Self {
            file: file.try_clone()?,
            inner: FileBackend::new(file)?,
        })
    }
}

impl StorageBackend for ReservedFile {
    fn set_len(&self, len: u64) -> io::Result<()> {
        let old = self.inner.len()?;
        if len <= old {
            return self.inner.set_len(len);
        }
        let signed = |value: u64| i64::try_from(value).map_err(io::Error::other);
        match fallocate(
            &self.file,
            FallocateFlags::empty(),
            signed(old)?,
            signed(len - old)?,
        ) {
            Ok(()) => Ok(()),
            // A file system that cannot: as good as it gets.
            Err(nix::Error::EOPNOTSUPP) => self.inner.set_len(len),
            Err(error) => {
                // What was taken before the room ended.
                self.inner.set_len(old)?;
                Err(error.into())
            }
        }
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.query_lock_range(start, end)
    }
}
