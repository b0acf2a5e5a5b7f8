//! What the thread has to be that serves files for the guest's users.
//!
//! `virtiofsd` creates a file as the guest's user by taking over that user's
//! effective ids for the call, with one exception: for uid 0 it stays what it
//! is. So it has to be root to begin with, or files of the guest's root would
//! be the pod's uid's. The thread therefore takes effective and saved uid 0:
//!
//! - effective 0 → files made by the guest's root are root's;
//! - saved 0 → the way back from a user's id, for which no capability is left:
//!   going from 0 to another effective uid empties the effective set, so a
//!   user's request is checked as the user's, and coming back fills it from
//!   the permitted set (capabilities(7));
//! - the real uid stays the pod's.
//!
//! The process needs, permitted: SETUID and SETGID for this; DAC_OVERRIDE,
//! CHOWN, FOWNER, FSETID, MKNOD and SETFCAP for what the guest's root may do
//! to files. Ids and capabilities belong to the thread: system calls are used
//! directly, as libc's wrappers change all threads of the process.

use std::io;

/// Takes root's effective ids and an own working directory and umask (which
/// the library changes) for the calling thread.
pub(super) fn ready_thread() -> io::Result<()> {
    let step = |what: &'static str| {
        move |e: io::Error| {
            io::Error::new(e.kind(), format!("virtio-fs thread: cannot {what}: {e}"))
        }
    };
    own_directory_and_umask().map_err(step("have its own working directory"))?;
    // SAFETY: no memory is involved, and umask cannot fail.
    unsafe { libc::umask(0) };
    // SAFETY: no memory is involved; -1 leaves the real id.
    check(unsafe { libc::syscall(libc::SYS_setresgid, -1, 0, 0) }).map_err(step("take gid 0"))?;
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_setresuid, -1, 0, 0) }).map_err(step("take uid 0"))
}

/// Runs `f`, which sets the umask of its process, where it sets nobody's.
pub(super) fn with_own_umask<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            own_directory_and_umask()?;
            f()
        });
        run.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn own_directory_and_umask() -> io::Result<()> {
    // SAFETY: no memory is involved; the thread alone is affected.
    check(unsafe { libc::syscall(libc::SYS_unshare, libc::CLONE_FS) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
