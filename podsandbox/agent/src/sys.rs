//! System calls that neither `libc` nor `nix` wraps: the file descriptor based
//! mount API, `openat2`, `clone3` and a few more.
//!
//! Everything here but [`async_fd`] and [`random`] is called between `clone3` and `execve` as
//! well, so nothing allocates, locks or touches the environment.

use std::ffi::{CStr, c_int, c_long, c_uint, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub type Result<T> = std::result::Result<T, Errno>;

/// `mount_setattr(2)`: flags to set and clear, and the propagation type (0:
/// unchanged).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountAttr {
    pub set: u64,
    pub clear: u64,
    pub propagation: u64,
}

impl MountAttr {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Registers `fd`, which must not block, with the runtime.
pub fn async_fd(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and the same descriptor for as long as it
    // lives, and the AsyncFd owns it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// Fills `bytes`, few enough that the kernel does so at once, from its random
/// number generator.
pub fn random(bytes: &mut [u8]) -> Result<()> {
    // SAFETY: writes at most the length given into a buffer that lives.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match Errno::result(got)? {
        got if got.unsigned_abs() == bytes.len() => Ok(()),
        _ => Err(Errno::EIO),
    }
}

fn owned(result: c_long) -> Result<OwnedFd> {
    let fd = Errno::result(result)?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub fn fsopen(kind: &CStr) -> Result<OwnedFd> {
    // SAFETY: `kind` is a valid C string for the length of the call.
    owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) })
}

// linux/mount.h, enum fsconfig_command.
const FSCONFIG_SET_FLAG: c_uint = 0;
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_SET_FD: c_uint = 5;
const FSCONFIG_CMD_CREATE: c_uint = 6;

fn fsconfig(
    fs: BorrowedFd<'_>,
    command: c_uint,
    key: Option<&CStr>,
    value: Option<&CStr>,
    aux: c_int,
) -> Result<()> {
    // SAFETY: the strings are valid C strings or null for the length of the
    // call, as each command wants them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            fs.as_raw_fd(),
            command,
            key.map_or(std::ptr::null(), CStr::as_ptr),
            value.map_or(std::ptr::null(), CStr::as_ptr),
            aux,
        )
    };
    Errno::result(result).map(drop)
}

pub fn fsconfig_flag(fs: BorrowedFd<'_>, key: &CStr) -> Result<()> {
    fsconfig(fs, FSCONFIG_SET_FLAG, Some(key), None, 0)
}

pub fn fsconfig_string(fs: BorrowedFd<'_>, key: &CStr, value: &CStr) -> Result<()> {
    fsconfig(fs, FSCONFIG_SET_STRING, Some(key), Some(value), 0)
}

pub fn fsconfig_fd(fs: BorrowedFd<'_>, key: &CStr, value: BorrowedFd<'_>) -> Result<()> {
    fsconfig(fs, FSCONFIG_SET_FD, Some(key), None, value.as_raw_fd())
}

pub fn fsconfig_create(fs: BorrowedFd<'_>) -> Result<()> {
    fsconfig(fs, FSCONFIG_CMD_CREATE, None, None, 0)
}

/// A mount of `fs` that is attached nowhere; closing the descriptor unmounts.
pub fn fsmount(fs: BorrowedFd<'_>, attributes: u64) -> Result<OwnedFd> {
    const FSMOUNT_CLOEXEC: c_uint = 1;
    // SAFETY: takes integers only.
    owned(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            fs.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            attributes,
        )
    })
}

/// A copy of the mount at `path` that is attached nowhere.
pub fn clone_mount(dir: BorrowedFd<'_>, path: &CStr, recursive: bool) -> Result<OwnedFd> {
    let mut flags = libc::OPEN_TREE_CLONE
        | libc::OPEN_TREE_CLOEXEC
        | (libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH) as c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as c_uint;
    }
    // SAFETY: `path` is a valid C string for the length of the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Attaches the detached mount `tree` at `target`.
pub fn move_mount(tree: RawFd, target: &CStr) -> Result<()> {
    // SAFETY: both paths are valid C strings for the length of the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree,
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_SYMLINKS,
        )
    };
    Errno::result(result).map(drop)
}

/// Changes the mount at `path`, relative to `dir`; with an empty path, the
/// mount that `dir` is.
pub fn mount_setattr(dir: RawFd, path: &CStr, recursive: bool, attr: MountAttr) -> Result<()> {
    let attr = libc::mount_attr {
        attr_set: attr.set,
        attr_clr: attr.clear,
        propagation: attr.propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `path` and `attr` are valid for the length of the call, and the
    // size given is `attr`'s.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir,
            path.as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}

/// Shows the files of `tree`, a mount that is attached nowhere, with the owners
/// that the user namespace `user` maps theirs to (mount_setattr(2), "ID-mapped
/// mounts").
pub fn idmap_mount(tree: BorrowedFd<'_>, user: BorrowedFd<'_>) -> Result<()> {
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(user.as_raw_fd()).map_err(|_| Errno::EBADF)?,
    };
    // SAFETY: path and `attr` are valid for the length of the call, and the
    // size given is `attr`'s.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}

/// Opens `path` so that neither `..` nor a symbolic link leads out of `dir`.
pub fn openat2(dir: BorrowedFd<'_>, path: &CStr, flags: c_int, resolve: u64) -> Result<OwnedFd> {
    // SAFETY: `open_how` is plain integers, for which zero is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.resolve = resolve;
    // SAFETY: `path` and `how` are valid for the length of the call, and the
    // size given is `how`'s.
    owned(unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir.as_raw_fd(),
            path.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    })
}

/// linux/sched.h; libc's constant is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What [`clone_process`] gives its caller.
pub enum Cloned {
    Child,
    Parent { pid: i32, pidfd: OwnedFd },
}

/// A child in new namespaces (`CLONE_NEW*`) and in `cgroup`, the caller's if
/// none is given; with `CLONE_PARENT` a child of the caller's parent. Its
/// memory is a copy of the caller's.
///
/// # Safety
/// The child may have been cloned while another thread held a lock, so it must
/// not allocate or take locks until it has called `execve` or `_exit`.
pub unsafe fn clone_process(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned> {
    let mut pidfd: c_int = -1;
    // SAFETY: `clone_args` is plain integers, for which zero is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PIDFD as u64;
    args.pidfd = &raw mut pidfd as u64;
    if flags & libc::CLONE_PARENT as u64 == 0 {
        // Else it has the caller's own.
        args.exit_signal = libc::SIGCHLD as u64;
    }
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM and with no stack given, this returns twice as
    // fork does; `args` and `pidfd` outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    };
    match Errno::result(result)? {
        0 => Ok(Cloned::Child),
        pid => Ok(Cloned::Parent {
            pid: i32::try_from(pid).map_err(|_| Errno::EOVERFLOW)?,
            // SAFETY: CLONE_PIDFD has stored a descriptor made for the caller.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

pub fn setns(fd: RawFd, namespaces: c_int) -> Result<()> {
    // SAFETY: takes integers only.
    Errno::result(unsafe { libc::setns(fd, namespaces) }).map(drop)
}

/// Runs `work` with another effective user id and the capabilities of this one
/// (capabilities(7), "Effect of user ID changes on capabilities"). A thread
/// that could not go back would be another one for good: it aborts.
pub fn with_effective_uid<T>(uid: u32, work: impl FnOnce() -> T) -> T {
    // The system call, not libc's function, which tells every thread.
    let change = |uid: u32| {
        const KEEP: u32 = u32::MAX;
        // SAFETY: takes integers only.
        Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, KEEP, uid, KEEP) }).map(drop)
    };
    // SAFETY: takes no arguments and cannot fail.
    let own = unsafe { libc::geteuid() };
    let set = |bits: c_int| prctl(libc::PR_SET_SECUREBITS, bits as u64, 0);
    let enter = set(libc::SECBIT_NO_SETUID_FIXUP).and_then(|()| change(uid));
    let result = work();
    if let Err(errno) = enter.and_then(|()| change(own)).and_then(|()| set(0)) {
        eprintln!("drupe-agent: cannot work as user {uid} for a while: {errno}");
        std::process::abort();
    }
    result
}

pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: c_int) -> Result<()> {
    // SAFETY: a null siginfo is allowed and means one as kill(2) makes it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<c_void>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// Closes every descriptor from `first` to `last`. Only for a process that is
/// about to exec: it does not ask who owns them.
pub fn close_range(first: RawFd, last: RawFd) -> Result<()> {
    // SAFETY: takes integers only; see above for the descriptors.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// `prctl` with integer arguments.
pub fn prctl(option: c_int, a: u64, b: u64) -> Result<()> {
    // SAFETY: only options that take integers are used with this.
    Errno::result(unsafe { libc::prctl(option, a, b, 0u64, 0u64) }).map(drop)
}

/// Capability sets of the calling thread, one bit a capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapSets {
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

pub fn capset(sets: CapSets) -> Result<()> {
    // _LINUX_CAPABILITY_VERSION_3: two words a set.
    const VERSION_3: u32 = 0x2008_0522;
    let header = CapHeader {
        version: VERSION_3,
        pid: 0,
    };
    let word = |shift: u32| CapData {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [word(0), word(32)];
    // SAFETY: version 3 reads a header and two data words, which both live.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(result).map(drop)
}

/// Installs a seccomp filter on the calling thread. `flags` as seccomp(2).
pub fn seccomp_filter(program: &[libc::sock_filter], flags: u64) -> Result<()> {
    let prog = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel reads `len` instructions, which live, and writes
    // nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const prog,
        )
    };
    Errno::result(result).map(drop)
}

/// How many bytes of its peer's a vsock socket, or each that it accepts, takes
/// before they are read.
pub fn set_vsock_buffer(socket: BorrowedFd<'_>, bytes: u64) -> Result<()> {
    // Of linux/vm_sockets.h.
    const BUFFER_SIZE: c_int = 0;
    const BUFFER_MAX_SIZE: c_int = 2;
    // Above the largest there may be, the size would be cut.
    for option in [BUFFER_MAX_SIZE, BUFFER_SIZE] {
        // SAFETY: setsockopt reads the given number of bytes of `bytes`
        // (vsock(7)), which lives.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::AF_VSOCK,
                option,
                (&raw const bytes).cast(),
                size_of_val(&bytes) as libc::socklen_t,
            )
        };
        Errno::result(set)?;
    }
    Ok(())
}
