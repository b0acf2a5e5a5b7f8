//! One system call with whatever arguments.

use std::ffi::{CStr, c_long};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

use super::FILE_LIMIT;

/// An argument.
#[derive(Clone, Copy)]
pub enum Arg {
    Number(i64),
    Text(&'static CStr),
    /// What the kernel only reads.
    Bytes(&'static [u8]),
    /// Of 4096 zeros that may be written.
    Zeros,
    /// The file that was handed over.
    File,
}

/// How an attempt is made.
pub enum Make {
    Call(c_long, &'static [Arg]),
    /// Behind a call that has to succeed.
    Behind((c_long, &'static [Arg]), (c_long, &'static [Arg])),
    /// A system call of the 32-bit table, from a 64-bit program.
    Call32,
}

impl Make {
    /// The name of its error; what it gives, if it gives something.
    pub fn outcome(&self, fds: &[OwnedFd]) -> String {
        let result = match self {
            Self::Call(number, arguments) => call(*number, arguments, fds),
            Self::Behind((number, arguments), then) => call(*number, arguments, fds)
                .map_err(|errno| panic!("{errno}"))
                .and_then(|_| call(then.0, then.1, fds)),
            Self::Call32 => call32(),
        };
        match result {
            Ok(_) => "done".to_owned(),
            Err(errno) => format!("{errno:?}"),
        }
    }
}

fn call(number: c_long, arguments: &[Arg], fds: &[OwnedFd]) -> Result<c_long, Errno> {
    let mut zeros = [0_u64; 512];
    let mut raw = [0_i64; 6];
    for (to, argument) in raw.iter_mut().zip(arguments) {
        *to = match argument {
            Arg::Number(number) => *number,
            Arg::Text(text) => text.as_ptr() as i64,
            Arg::Bytes(bytes) => bytes.as_ptr() as i64,
            Arg::Zeros => zeros.as_mut_ptr() as i64,
            Arg::File => fds[1].as_raw_fd().into(),
        };
    }
    let [a, b, c, d, e, f] = raw;
    // SAFETY: pointers are to constants that last for ever and to 4096 bytes that
    // outlive the call. Calls that could harm this process beyond that end it,
    // and it was made for this one.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    Errno::result(result)
}

/// getpid(2) of i386.
#[cfg(target_arch = "x86_64")]
fn call32() -> Result<c_long, Errno> {
    let result: i64;
    // SAFETY: the call has no arguments and touches no memory; rbx, which the
    // table's convention uses, stays as it is.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("rax") 20_i64 => result, options(nostack));
    }
    Ok(result)
}

/// Bytes that are more than an unpacker may have.
pub const TOO_MUCH: i64 = 1 << 40;
/// Where a file may not reach.
pub const TOO_FAR: i64 = FILE_LIMIT as i64;
