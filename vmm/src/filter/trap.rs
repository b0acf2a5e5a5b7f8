//! What comes of a call that a thread's list lacks ([`Answer::Trap`]): the
//! kernel raises SIGSYS in that thread, the handler tells the supervisor through
//! a pipe and has the call fail with EPERM; the supervisor ends the machine and
//! says why.
//!
//! Whoever has taken over a thread can keep the handler from telling. It gets
//! EPERM all the same.
//!
//! [`Answer::Trap`]: super::Answer::Trap

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use libc::{c_int, c_void, siginfo_t};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{pipe2, read};

use super::{Role, calls};

/// What the handler writes: the role and the call's number.
const MESSAGE: usize = 8;

/// Where the handler writes; negative: nowhere.
static TO: AtomicI32 = AtomicI32::new(-1);

/// The pod's end of the pipe.
pub struct Traps(OwnedFd);

/// A pipe for the handlers of the pod's processes.
pub fn pipe() -> io::Result<(Traps, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    Ok((Traps(reader), writer))
}

/// Has every thread of this process tell through `writer`. To be called once,
/// before the first of them has a filter.
pub fn tell_through(writer: OwnedFd) -> io::Result<()> {
    TO.store(writer.into_raw_fd(), Ordering::Release);
    // SAFETY: all-zero bytes are a valid sigaction.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = on_refused as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler does what a handler may, and is there for good.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The beginning of a `siginfo_t` of SIGSYS, which the crate `libc` does not
/// have.
#[repr(C)]
struct Refused {
    signal: c_int,
    /// What the filter has said beside its answer.
    role: c_int,
    code: c_int,
    address: *mut c_void,
    call: c_int,
    architecture: u32,
}

/// `si_code` of a filter's answer.
const SYS_SECCOMP: c_int = 1;

extern "C" fn on_refused(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO the signal's
    // information, which begins so for SIGSYS.
    let refused = unsafe { &*info.cast::<Refused>() };
    if refused.code != SYS_SECCOMP {
        return;
    }
    let before = Errno::last_raw();
    let mut message = [0; MESSAGE];
    message[..4].copy_from_slice(&refused.role.to_ne_bytes());
    message[4..].copy_from_slice(&refused.call.to_ne_bytes());
    // One that does not go into the pipe is one of many.
    // SAFETY: the kernel reads the message, which lives.
    unsafe { libc::write(TO.load(Ordering::Acquire), message.as_ptr().cast(), MESSAGE) };
    Errno::set_raw(before);
    // SAFETY: beside it the kernel hands the thread's registers, as a
    // `ucontext_t`, which it takes back.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    *result(context) = -i64::from(libc::EPERM);
}

/// The register in which a call's result is.
#[cfg(target_arch = "x86_64")]
fn result(context: &mut libc::ucontext_t) -> &mut i64 {
    &mut context.uc_mcontext.gregs[libc::REG_RAX as usize]
}

#[cfg(target_arch = "aarch64")]
fn result(context: &mut libc::ucontext_t) -> &mut i64 {
    let register: *mut u64 = &raw mut context.uc_mcontext.regs[0];
    // SAFETY: of the same size and alignment, and as long as `context` is.
    unsafe { &mut *register.cast() }
}

impl Traps {
    /// One call that was refused, in words; `None` when there is none. Never
    /// waits.
    pub fn take(&self) -> io::Result<Option<String>> {
        let mut message = [0; MESSAGE];
        match read(&self.0, &mut message) {
            Ok(MESSAGE) => Ok(Some(in_words(message))),
            // Written at once or not at all, by handlers.
            Ok(_) => Ok(Some("a call of the pod's processes was refused".to_owned())),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn in_words(message: [u8; MESSAGE]) -> String {
    let [role, call] = [0, 4].map(|at| {
        let bytes = [0, 1, 2, 3].map(|byte| message[at + byte]);
        c_int::from_ne_bytes(bytes)
    });
    let call = calls::name(call.into());
    let who = match u16::try_from(role).ok().and_then(Role::of_number) {
        Some(Role::FileServer) => "the file server".to_owned(),
        Some(role) => format!("the monitor's thread {:?}", role.name()),
        None => "a thread of the pod's monitor".to_owned(),
    };
    format!("{who} made a system call that it has no use for: {call}")
}

impl AsFd for Traps {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::confine;

    #[test]
    fn a_call_that_a_list_lacks_fails_and_is_told_with_the_role() {
        let (traps, writer) = pipe().unwrap();
        tell_through(writer).unwrap();
        let calls = std::thread::spawn(|| {
            confine(Role::Logs).unwrap();
            Errno::set_raw(0);
            // SAFETY: it makes a socket at most.
            let refused = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
            (refused, Errno::last())
        });
        assert_eq!(calls.join().unwrap(), (-1, Errno::EPERM));
        assert_eq!(
            traps.take().unwrap().as_deref(),
            Some("the monitor's thread \"logs\" made a system call that it has no use for: socket")
        );
        assert_eq!(traps.take().unwrap(), None);
    }

    #[test]
    fn what_a_process_of_the_pod_writes_by_itself_is_words_all_the_same() {
        let (traps, writer) = pipe().unwrap();
        let say = |bytes: &[u8]| nix::unistd::write(&writer, bytes).unwrap();
        say(&[0xff; MESSAGE]);
        let told = traps.take().unwrap().unwrap();
        assert!(told.starts_with("a thread of the pod's monitor"), "{told}");
        say(&[1, 2, 3]);
        let told = traps.take().unwrap().unwrap();
        assert_eq!(told, "a call of the pod's processes was refused");
    }
}
