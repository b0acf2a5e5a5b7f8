//! What the guest kernel's process is kept to: a user namespace, and two filters
//! of system calls, one from its exec on and one that the kernel is handed, to
//! install before its first program.

use std::io::{self, IoSliceMut, Read, Write};
use std::mem;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use vmm_client::UmlMode;

use crate::filter::{self, Answer, Program, Refusals, uml};

/// Has `command` enter a user namespace before its exec, which takes what
/// capabilities it gets by that. To be asked for before [`Confinement::of`],
/// whose filter lets nobody enter one.
pub fn enter(command: &mut Command, user_ns: OwnedFd) {
    let enter = move || {
        setns(&user_ns, CloneFlags::CLONE_NEWUSER)?;
        drop_bounding_set()
    };
    // SAFETY: between fork and exec it makes system calls and allocates
    // nothing.
    unsafe { command.pre_exec(enter) };
}

/// Whoever enters a user namespace has all capabilities in it, and may have
/// them again until they are out of this set.
fn drop_bounding_set() -> io::Result<()> {
    // Higher numbers than there are bits for are no capabilities.
    for capability in 0..64 {
        // SAFETY: no memory is involved.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } == 0 {
            continue;
        }
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            // Beyond the last that this node's kernel has.
            Some(libc::EINVAL) if capability > 0 => Ok(()),
            _ => Err(error),
        };
    }
    Ok(())
}

/// Our ends, once the kernel runs.
pub struct Confined {
    seal: UnixStream,
    /// Absent where the node's kernel cannot ask.
    pub refusals: Option<Refusals>,
}

/// A kernel's process to be.
pub struct Confinement {
    ours: UnixStream,
    kernels: UnixStream,
}

impl Confinement {
    /// Has `command` install the first filter before its exec and tells its
    /// kernel of the second one. `None` where the node's kernel has no filters.
    pub fn of(command: &mut Command, mode: UmlMode) -> io::Result<Option<Self>> {
        if !filter::is_supported() {
            return Ok(None);
        }
        let (mut ours, kernels) = UnixStream::pair()?;
        // Far less than a socket holds, so nobody has to read meanwhile.
        ours.write_all(&Program::new(&uml::seal(mode)).bytes())?;
        ours.shutdown(Shutdown::Write)?;
        fcntl(&kernels, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let fd = kernels.as_raw_fd();
        command.arg(format!("seal=fd:{fd}"));

        let refusing = Program::new(&uml::boot(mode, Answer::Refuse(Errno::EPERM)));
        let asking = filter::can_ask().then(|| Program::new(&uml::boot(mode, Answer::Ask)));
        let install = move || {
            let listener = match asking.as_ref().map(Program::install_listening) {
                Some(Ok(listener)) => Some(listener),
                // Someone further out listens: some container engines do.
                Some(Err(e)) if e.raw_os_error() != Some(libc::EBUSY) => return Err(e),
                _ => {
                    refusing.install()?;
                    None
                }
            };
            hand_over(fd, listener.as_ref())
        };
        // SAFETY: between fork and exec it makes system calls and allocates
        // nothing.
        unsafe { command.pre_exec(install) };
        Ok(Some(Self { ours, kernels }))
    }

    /// To be called once the kernel was executed.
    pub fn complete(self) -> io::Result<Confined> {
        drop(self.kernels);
        let refusals = take_over(&self.ours)?.map(Refusals::new);
        self.ours.set_nonblocking(true)?;
        Ok(Confined {
            seal: self.ours,
            refusals,
        })
    }
}

impl Confined {
    /// Whether the kernel has installed the second filter. It says so before
    /// its first program runs.
    pub fn is_sealed(&mut self) -> io::Result<bool> {
        match self.seal.read(&mut [0]) {
            Ok(read) => Ok(read == 1),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }
}

/// Room for one descriptor; a `cmsghdr` is aligned as its length is.
const RIGHTS: usize = 64;

#[repr(C, align(8))]
struct Rights([u8; RIGHTS]);

/// Sends one byte, `listener` beside it. Allocates nothing.
fn hand_over(socket: RawFd, listener: Option<&OwnedFd>) -> io::Result<()> {
    let mut byte = 0u8;
    let mut vector = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    let mut rights = Rights([0; RIGHTS]);
    if let Some(listener) = listener {
        let size = size_of::<RawFd>() as libc::c_uint;
        // SAFETY: these compute sizes.
        let (space, length) = unsafe { (libc::CMSG_SPACE(size), libc::CMSG_LEN(size)) };
        message.msg_control = rights.0.as_mut_ptr().cast();
        message.msg_controllen = space as _;
        // SAFETY: `msg_control` is aligned and has room for the header and its
        // one descriptor, RIGHTS being more than CMSG_SPACE of it (24).
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = length as _;
            let data = libc::CMSG_DATA(header).cast::<RawFd>();
            data.write_unaligned(listener.as_raw_fd());
        }
    }
    // SAFETY: the message and what it points at live through the call.
    match unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What [`hand_over`] has sent.
fn take_over(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!([RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    let mut fds = received.cmsgs()?.filter_map(|cmsg| match cmsg {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel has just made this descriptor for this process and
    // nothing else knows it.
    Ok(fds.next().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}
