//! The calls of a `uml` guest's kernel process and of its stubs, the processes
//! in which the guest's programs run. Stubs inherit what the kernel has.
//!
//! ```text
//! exec ── boot list ──▶ its own start ── sealed list ──▶ the guest's first program
//! ```
//! Both hold from the seal on; the kernel installs it itself, since no other
//! process can (`uml-4-seal.patch`). Nothing here ends a process: in `seccomp`
//! mode a stub's own filter answers the guest's calls with a signal, and of
//! several answers the most severe counts: end, signal, error, ask, allow.

use libc::{c_int, c_ulong};
use nix::errno::Errno;
use vmm_client::UmlMode;

use super::{Answer, Check, List, arg};

/// What a pod's guest needs as long as it runs.
const STEADY: &[&str] = &[
    // Waiting, and being woken.
    "futex",
    "poll",
    "ppoll",
    "epoll_wait",
    "epoll_pwait",
    "epoll_ctl",
    "signalfd4",
    "eventfd2",
    "restart_syscall",
    // Signals: device interrupts, timers, between processors, to stubs.
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "rt_tgsigqueueinfo",
    "sigaltstack",
    "kill",
    "tgkill",
    "wait4",
    // Time.
    "timer_settime",
    "clock_gettime",
    // Descriptors that are open: devices, the console, a stub's socket.
    "read",
    "write",
    "sendmsg",
    "close",
    "close_range",
    // Memory of stubs goes, and the processor that they share with their kernel.
    "munmap",
    "getcpu",
    "sched_getaffinity",
    "sched_setaffinity",
    "getpid",
    "gettid",
    // By libc, for each signal between processors.
    "getuid",
    "getrandom",
    "exit",
    "exit_group",
];

/// What the kernel needs before its first program: its libc's start, the file
/// that is its memory, /proc/cpuinfo, the initramfs, its devices' sockets.
const START: &[&str] = &[
    "execve",
    "brk",
    "mprotect",
    "mremap",
    "madvise",
    "memfd_create",
    "access",
    "faccessat",
    "faccessat2",
    "open",
    "openat",
    "stat",
    "fstat",
    "newfstatat",
    "statx",
    "statfs",
    "fstatfs",
    "readlink",
    "readlinkat",
    "getdents64",
    "lseek",
    "pread64",
    "mkdir",
    "mkdirat",
    "rmdir",
    "unlink",
    "unlinkat",
    "connect",
    "epoll_create",
    "epoll_create1",
    "timer_create",
    "setsid",
    "getppid",
    "uname",
    "set_tid_address",
    "set_robust_list",
    "rseq",
];

/// What the crate `libc` does not have.
const CLONE_NEWTIME: c_int = 0x80;
const F_SETSIG: c_int = 10;
const ARCH_SET_GS: c_int = 0x1001;
const ARCH_SET_FS: c_int = 0x1002;
const PTRACE_KILL: c_int = 8;
const PTRACE_GETREGS: c_int = 12;
const PTRACE_SETREGS: c_int = 13;
const PTRACE_SYSEMU: c_int = 31;
const PTRACE_SYSEMU_SINGLESTEP: c_int = 32;

/// Any of these makes a namespace. CLONE_NEWTIME has a bit of the signal's.
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP
    | CLONE_NEWTIME) as u64;

/// The personality that UML asks for although it has it.
const PERSONALITY: c_int = libc::ADDR_NO_RANDOMIZE;

/// From exec on. `unnamed` is for what is not on it: [`Answer::Ask`] where
/// someone listens, else an error.
#[must_use]
pub fn boot(mode: UmlMode, unnamed: Answer) -> List {
    let list = always(List::new(unnamed))
        .allow(START)
        .allow(&["mmap", "fcntl", "dup2", "dup3", "socketpair"])
        .allow(&["arch_prctl"])
        .allow_if("clone", &[&[arg(0).has_none_of(NAMESPACES)]])
        .allow_if("socket", &[&[arg(0).is_int(libc::AF_UNIX)]])
        .allow_if("seccomp", FILTER)
        // Where a memfd cannot be said to be a program (Linux before 6.3), the
        // stub's is a file of its own memory's directory.
        .allow_if("fchmod", &[&[arg(1).is_int(0o500)]])
        .allow_if("personality", &[&[arg(0).is_int(PERSONALITY)]])
        .allow_if("prlimit64", &[&[arg(0).is_int(0)]]);
    match mode {
        UmlMode::Seccomp => stubs_by_filter(list),
        UmlMode::Ptrace => stubs_by_trace(list, TRYING_TO_TRACE),
    }
}

/// From the guest's first program on.
#[must_use]
pub fn sealed(mode: UmlMode) -> List {
    let list = always(List::new(Answer::Refuse(Errno::EPERM)))
        .allow_if(
            "mmap",
            &[&[arg(3).is(GUEST_MEMORY)], &[arg(3).is(OWN_MEMORY)]],
        )
        .allow_if("clone", &[&[arg(0).is(STUB)]])
        // A stub's first descriptor is its socket.
        .allow_if("dup2", &[&[arg(1).is_int(0)]])
        .allow_if("dup3", &[&[arg(1).is_int(0)]])
        .allow_if("socketpair", UNIX_STREAM)
        .allow_if("fcntl", FCNTL);
    match mode {
        UmlMode::Seccomp => stubs_by_filter(list)
            .allow_if("seccomp", FILTER)
            .allow_if("arch_prctl", THREAD_LOCALS),
        UmlMode::Ptrace => stubs_by_trace(list, &[]),
    }
}

/// What the kernel is to install: [`sealed`] below [`boot`].
#[must_use]
pub fn seal(mode: UmlMode) -> List {
    sealed(mode).below(&boot(mode, Answer::Ask))
}

const STUB: u64 = (libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD) as u64;
const GUEST_MEMORY: u64 = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
const OWN_MEMORY: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;

const UNIX_STREAM: &[&[Check]] = &[&[
    arg(0).is_int(libc::AF_UNIX),
    arg(1).is_int(libc::SOCK_STREAM),
    arg(2).is_int(0),
]];

const FCNTL: &[&[Check]] = &[
    &[arg(1).is_int(libc::F_SETFD)],
    &[arg(1).is_int(libc::F_GETFL)],
    &[arg(1).is_int(libc::F_SETFL)],
    &[arg(1).is_int(libc::F_SETOWN)],
    &[arg(1).is_int(F_SETSIG)],
];

/// The stub's program is a descriptor. That the path beside it is empty cannot
/// be seen here; a program that is found by it has the same rights, none.
const EXECVEAT: &[&[Check]] = &[&[arg(4).is_int(libc::AT_EMPTY_PATH)]];

const PRCTL: &[&[Check]] = &[
    &[arg(0).is_int(libc::PR_SET_NAME)],
    &[arg(0).is_int(libc::PR_SET_PDEATHSIG)],
    &[arg(0).is_int(libc::PR_SET_NO_NEW_PRIVS)],
];

/// For all threads: the seal, and a stub's own.
const FILTER: &[&[Check]] = &[&[
    arg(0).is_int(libc::SECCOMP_SET_MODE_FILTER as c_int),
    arg(1).is(libc::SECCOMP_FILTER_FLAG_TSYNC as c_ulong),
]];

const THREAD_LOCALS: &[&[Check]] = &[&[arg(0).is_int(ARCH_SET_FS)], &[arg(0).is_int(ARCH_SET_GS)]];

/// Whoever is to be traced asks for it: no request here takes a process that
/// does not.
const TRACE: &[c_int] = &[
    PTRACE_SYSEMU,
    PTRACE_SYSEMU_SINGLESTEP,
    PTRACE_GETREGS,
    PTRACE_SETREGS,
    libc::PTRACE_GETREGSET as c_int,
    libc::PTRACE_SETREGSET as c_int,
    libc::PTRACE_CONT as c_int,
    libc::PTRACE_GETSIGINFO as c_int,
    libc::PTRACE_SETOPTIONS as c_int,
    libc::PTRACE_TRACEME as c_int,
    PTRACE_KILL,
];

/// How the kernel finds out at its start whether it can.
const TRYING_TO_TRACE: &[c_int] = &[
    libc::PTRACE_SYSCALL as c_int,
    libc::PTRACE_PEEKUSER as c_int,
    libc::PTRACE_POKEUSER as c_int,
];

/// What both lists have in both modes.
fn always(list: List) -> List {
    list.allow(STEADY)
        .allow_if("execveat", EXECVEAT)
        .allow_if("prctl", PRCTL)
        // libc takes clone, whose flags can be seen, where this is missing.
        .refuse(&["clone3"], Errno::ENOSYS)
        // libc asks descriptors whether they are terminals.
        .refuse(&["ioctl"], Errno::ENOTTY)
}

fn stubs_by_filter(list: List) -> List {
    list.allow(&["recvmsg"])
        // It is tried at the end of each process and not missed.
        .refuse(&["ptrace"], Errno::EPERM)
}

fn stubs_by_trace(list: List, more: &[c_int]) -> List {
    let requests = TRACE.iter().chain(more);
    let cases: Vec<_> = requests.map(|request| [arg(0).is_int(*request)]).collect();
    let cases: Vec<&[Check]> = cases.iter().map(<[Check; 1]>::as_slice).collect();
    list.allow_if("ptrace", &cases)
}
