//! The files that the guest has open, and the reading and writing of them: by
//! the file server's descriptors, between a file and the guest's memory.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use super::request::{ReadIn, WriteIn};
use crate::devices::iov::Iov;

/// By the number that the guest names them by.
#[derive(Default)]
pub(super) struct OpenFiles(HashMap<u64, OwnedFd>);

impl OpenFiles {
    pub(super) fn opened(&mut self, handle: u64, file: OwnedFd) {
        self.0.insert(handle, file);
    }

    pub(super) fn released(&mut self, handle: u64) {
        self.0.remove(&handle);
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    fn get(&self, handle: u64) -> io::Result<&OwnedFd> {
        let file = self.0.get(&handle);
        file.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// The bytes read into the front of `room`; fewer only at the file's end.
    pub(super) fn read(&self, asked: &ReadIn, room: &mut Iov<'_>) -> io::Result<usize> {
        let file = self.get(asked.handle)?;
        if room.len() < asked.size {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        room.take(asked.size).read_at(file, asked.offset)
    }

    pub(super) fn write(&self, asked: &WriteIn, data: &mut Iov<'_>) -> io::Result<usize> {
        let file = self.get(asked.handle)?;
        if data.len() < asked.size {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let flags = if asked.append { libc::RWF_APPEND } else { 0 };
        data.take(asked.size).write_at(file, asked.offset, flags)
    }
}
