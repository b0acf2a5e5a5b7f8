//! The library's file system behind checks of what a guest asks for, and the
//! place where an open file's descriptor is taken for the monitor.
//!
//! The library resolves some names by plain `*at` system calls. So a name is one
//! component here or it is refused, for every operation that has one: nothing of
//! a guest reaches a path look-up otherwise.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
    ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, FsOptions, OpenOptions, SetattrIn, SetattrValid, SetxattrFlags};
use virtiofsd::oslib::ReadvFlags;
use virtiofsd::passthrough::PassthroughFs;

type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;

/// What the last request has opened, if it did.
#[derive(Clone, Default)]
pub(super) struct Opened(Arc<Mutex<Option<(u64, OwnedFd)>>>);

impl Opened {
    pub(super) fn take(&self) -> Option<(u64, OwnedFd)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn put(&self, handle: u64, fd: OwnedFd) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((handle, fd));
    }
}

pub(super) struct Checked {
    inner: PassthroughFs,
    opened: Opened,
}

/// Takes the descriptor of the file that it is to copy from.
struct Capture<'a>(&'a mut Option<OwnedFd>);

impl ZeroCopyWriter for Capture<'_> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        _count: usize,
        _offset: u64,
        _flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        *self.0 = Some(file.try_clone()?.into());
        Ok(0)
    }
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// One component of a path: the guest's kernel sends nothing else. How long it
/// may be is the file system's to say: 255 bytes in most, 255 letters in some.
fn component(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" => Err(error(libc::ENOENT)),
        b"." | b".." => Err(error(libc::EINVAL)),
        name if name.contains(&b'/') => Err(error(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// Whether MKNOD may make it: no device but overlayfs' mark of a deleted file,
/// a character device with the numbers 0 and 0, which opens for nobody.
fn is_harmless(mode: u32, rdev: u32) -> bool {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => true,
        libc::S_IFCHR => rdev == 0,
        _ => false,
    }
}

impl Checked {
    pub(super) fn new(inner: PassthroughFs) -> (Self, Opened) {
        let opened = Opened::default();
        let checked = Self {
            inner,
            opened: opened.clone(),
        };
        (checked, opened)
    }

    /// Keeps the open file's descriptor for the answer; one that cannot be
    /// handed over is not left open.
    fn hand_over(&self, context: Context, inode: Inode, handle: Option<Handle>) -> io::Result<()> {
        let Some(handle) = handle else {
            return Ok(());
        };
        let mut captured = None;
        let capture = Capture(&mut captured);
        let read = self
            .inner
            .read(context, inode, handle, capture, 0, 0, None, 0);
        match read.and_then(|_| captured.ok_or_else(|| error(libc::EBADF))) {
            Ok(fd) => {
                self.opened.put(handle, fd);
                Ok(())
            }
            Err(failed) => {
                self.inner
                    .release(context, inode, 0, handle, false, false, None)?;
                Err(failed)
            }
        }
    }
}

/// Operations that the library does as they are.
macro_rules! as_they_are {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $($argument: $kind),*) -> $result {
            self.inner.$name($($argument),*)
        })*
    };
}

impl FileSystem for Checked {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn lookup(&self, context: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        self.inner.lookup(context, parent, name)
    }

    fn symlink(
        &self,
        context: Context,
        target: &CStr,
        parent: Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        component(name)?;
        self.inner
            .symlink(context, target, parent, name, extensions)
    }

    fn mknod(
        &self,
        context: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        component(name)?;
        if !is_harmless(mode, rdev) {
            return Err(error(libc::EPERM));
        }
        self.inner
            .mknod(context, parent, name, mode, rdev, umask, extensions)
    }

    fn mkdir(
        &self,
        context: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        component(name)?;
        self.inner
            .mkdir(context, parent, name, mode, umask, extensions)
    }

    fn unlink(&self, context: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        component(name)?;
        self.inner.unlink(context, parent, name)
    }

    fn rmdir(&self, context: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        component(name)?;
        self.inner.rmdir(context, parent, name)
    }

    fn rename(
        &self,
        context: Context,
        from: Inode,
        from_name: &CStr,
        to: Inode,
        to_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        component(from_name)?;
        component(to_name)?;
        self.inner
            .rename(context, from, from_name, to, to_name, flags)
    }

    fn link(
        &self,
        context: Context,
        inode: Inode,
        parent: Inode,
        name: &CStr,
    ) -> io::Result<Entry> {
        component(name)?;
        self.inner.link(context, inode, parent, name)
    }

    fn open(
        &self,
        context: Context,
        inode: Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let (handle, options) = self.inner.open(context, inode, kill_priv, flags)?;
        self.hand_over(context, inode, handle)?;
        Ok((handle, options))
    }

    fn create(
        &self,
        context: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        component(name)?;
        let (entry, handle, options) = self.inner.create(
            context, parent, name, mode, kill_priv, flags, umask, extensions,
        )?;
        self.hand_over(context, entry.inode, handle)
            .inspect_err(|_| self.inner.forget(context, entry.inode, 1))?;
        Ok((entry, handle, options))
    }

    /// The monitor reads, by the open file's descriptor.
    fn read<W: ZeroCopyWriter>(
        &self,
        _context: Context,
        _inode: Inode,
        _handle: Handle,
        _to: W,
        _size: u32,
        _offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        Err(error(libc::EBADF))
    }

    /// The monitor writes, by the open file's descriptor.
    fn write<R: ZeroCopyReader>(
        &self,
        _context: Context,
        _inode: Inode,
        _handle: Handle,
        _from: R,
        _size: u32,
        _offset: u64,
        _lock_owner: Option<u64>,
        _delayed: bool,
        _kill_priv: bool,
        _flags: u32,
    ) -> io::Result<usize> {
        Err(error(libc::EBADF))
    }

    fn forget(&self, context: Context, inode: Inode, count: u64) {
        self.inner.forget(context, inode, count);
    }

    fn batch_forget(&self, context: Context, requests: Vec<(Inode, u64)>) {
        self.inner.batch_forget(context, requests);
    }

    fn destroy(&self) {
        self.inner.destroy();
    }

    as_they_are! {
        fn init(capable: FsOptions) -> io::Result<FsOptions>;
        fn getattr(context: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(Attr, Duration)>;
        fn setattr(context: Context, inode: Inode, attr: SetattrIn, handle: Option<Handle>, valid: SetattrValid) -> io::Result<(Attr, Duration)>;
        fn readlink(context: Context, inode: Inode) -> io::Result<Vec<u8>>;
        fn flush(context: Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()>;
        fn fsync(context: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn fallocate(context: Context, inode: Inode, handle: Handle, mode: u32, offset: u64, length: u64) -> io::Result<()>;
        fn release(context: Context, inode: Inode, flags: u32, handle: Handle, flush: bool, flock_release: bool, lock_owner: Option<u64>) -> io::Result<()>;
        fn statfs(context: Context, inode: Inode) -> io::Result<libc::statvfs64>;
        fn setxattr(context: Context, inode: Inode, name: &CStr, value: &[u8], flags: u32, extra_flags: SetxattrFlags) -> io::Result<()>;
        fn getxattr(context: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(context: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(context: Context, inode: Inode, name: &CStr) -> io::Result<()>;
        fn opendir(context: Context, inode: Inode, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)>;
        fn readdir(context: Context, inode: Inode, handle: Handle, size: u32, offset: u64) -> io::Result<Self::DirIter>;
        fn fsyncdir(context: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn releasedir(context: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()>;
        fn access(context: Context, inode: Inode, mask: u32) -> io::Result<()>;
        fn lseek(context: Context, inode: Inode, handle: Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn copyfilerange(context: Context, inode_in: Inode, handle_in: Handle, offset_in: u64, inode_out: Inode, handle_out: Handle, offset_out: u64, len: u64, flags: u64) -> io::Result<usize>;
        fn syncfs(context: Context, inode: Inode) -> io::Result<()>;
        fn tmpfile() -> io::Result<(Entry, Option<Handle>, OpenOptions)>;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_component() {
        let errno = |name: &CStr| component(name).err().and_then(|e| e.raw_os_error());
        // Letters of which 255 are longer than 255 bytes.
        let long = std::ffi::CString::new("ä".repeat(255)).unwrap();
        for name in [c"a", c"...", c"a b", c"..a", &long] {
            assert_eq!(errno(name), None, "{name:?}");
        }
        for name in [c".", c"..", c"a/b", c"/", c"../a", c"a/"] {
            assert_eq!(errno(name), Some(libc::EINVAL), "{name:?}");
        }
        assert_eq!(errno(c""), Some(libc::ENOENT));
    }

    #[test]
    fn no_device_is_made_but_the_mark_of_a_deleted_file() {
        for (mode, rdev, harmless) in [
            (libc::S_IFREG, 0, true),
            (libc::S_IFIFO, 5, true),
            (libc::S_IFSOCK, 0, true),
            (0, 0, true),
            (libc::S_IFCHR, 0, true),
            (libc::S_IFCHR, 0x105, false),
            (libc::S_IFBLK, 0, false),
            (libc::S_IFBLK, 0x800, false),
            (libc::S_IFDIR, 0, false),
            (libc::S_IFLNK, 0, false),
            (libc::S_IFMT, 0, false),
        ] {
            assert_eq!(is_harmless(mode | 0o666, rdev), harmless, "{mode:o}");
        }
    }
}
