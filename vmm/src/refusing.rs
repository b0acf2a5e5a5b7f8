//! A kernel without a system call, for tests.

use std::io;

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

/// Has `call` fail with `errno` in the calling thread and in those that it
/// starts, for good.
pub(crate) fn refuse_to_this_thread(call: libc::c_long, errno: i32) {
    let op = |code: u32, jf: u8, k: u32| sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let mut program = [
        // The call's number comes first in a seccomp_data.
        op(BPF_LD | BPF_W | BPF_ABS, 0, 0),
        op(BPF_JMP | BPF_JEQ | BPF_K, 1, call as u32),
        op(BPF_RET | BPF_K, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        op(BPF_RET | BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the program outlives the call, which copies it.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}
