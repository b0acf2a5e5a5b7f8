//! What is tried, and what it must come to.

use std::ffi::c_long;

use libc::{AT_FDCWD, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, MAP_ANONYMOUS};

use super::call::{Arg, Make, TOO_FAR, TOO_MUCH};
use Arg::{Bytes as B, File, Number as N, Text as T, Zeros as Z};

pub struct Attempt {
    pub name: &'static str,
    pub make: Make,
    /// In the jail as it is.
    pub jailed: &'static str,
    /// In one that has neither seccomp nor Landlock; None: that depends on the
    /// kernel and its settings.
    pub bare: Option<&'static str>,
}

const KILLED: &str = "SIGSYS";

/// A call that ends the process, and what becomes of it without the filter.
const fn refused(
    name: &'static str,
    number: c_long,
    arguments: &'static [Arg],
    bare: Option<&'static str>,
) -> Attempt {
    Attempt {
        name,
        make: Make::Call(number, arguments),
        jailed: KILLED,
        bare,
    }
}

/// A call that is open to unpackers, and has its limit elsewhere.
const fn limited(name: &'static str, make: Make, outcome: &'static str) -> Attempt {
    Attempt {
        name,
        make,
        jailed: outcome,
        bare: Some(outcome),
    }
}

const CWD: Arg = N(AT_FDCWD as i64);
const PASSWD: Arg = T(c"/etc/passwd");
const NEW: Arg = T(c"/new");
const PRIVATE: i64 = (libc::MAP_PRIVATE | MAP_ANONYMOUS) as i64;
const RW: i64 = (libc::PROT_READ | libc::PROT_WRITE) as i64;
const RX: i64 = (libc::PROT_READ | libc::PROT_EXEC) as i64;
const STREAM: Arg = N(libc::SOCK_STREAM as i64);
const RAW: Arg = N(libc::SOCK_RAW as i64);
/// A file handle of eight bytes.
const HANDLE: Arg = B(b"\x08\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0");
/// Eight bytes of memory at 4096.
const PIECE: Arg = B(b"\0\x10\0\0\0\0\0\0\x08\0\0\0\0\0\0\0");
/// Of the namespaces' first process, which is this one, and of another.
const SELF: Arg = N(1);
const OTHER: Arg = N(2);

const fn family(family: i32) -> Arg {
    N(family as i64)
}

const fn flags(flags: i32) -> Arg {
    N(flags as i64)
}

#[rustfmt::skip]
pub const ATTEMPTS: &[Attempt] = &[
    // Files. Where there is a new descriptor to be had, the limit of none comes
    // first.
    refused("open a file", libc::SYS_openat, &[CWD, PASSWD, N(0)], Some("EMFILE")),
    refused("open the root", libc::SYS_openat, &[CWD, T(c"/"), N(0)], Some("EMFILE")),
    refused("openat2", libc::SYS_openat2, &[CWD, PASSWD, Z, N(24)], Some("EMFILE")),
    refused("look at a file", libc::SYS_newfstatat, &[CWD, PASSWD, Z, N(0)], Some("ENOENT")),
    refused("look for /proc", libc::SYS_faccessat, &[CWD, T(c"/proc/self"), N(0)], Some("ENOENT")),
    refused("look for /dev", libc::SYS_faccessat, &[CWD, T(c"/dev/null"), N(0)], Some("ENOENT")),
    refused("go up", libc::SYS_faccessat, &[CWD, T(c"../../etc/passwd"), N(0)], Some("ENOENT")),
    refused("change the directory", libc::SYS_chdir, &[T(c"/etc")], Some("ENOENT")),
    refused("make a directory", libc::SYS_mkdirat, &[CWD, NEW, N(0o777)], Some("EROFS")),
    refused("make a device node", libc::SYS_mknodat, &[CWD, NEW, N(0o20666), N(0x105)], Some("EROFS")),
    refused("make a link", libc::SYS_symlinkat, &[PASSWD, CWD, NEW], Some("EROFS")),
    refused("remove a name", libc::SYS_unlinkat, &[CWD, NEW, N(0)], Some("EROFS")),
    refused("rename", libc::SYS_renameat2, &[CWD, NEW, CWD, T(c"/newer"), N(0)], Some("EROFS")),
    refused("change the root's mode", libc::SYS_fchmodat, &[CWD, T(c"/"), N(0o777)], Some("EROFS")),
    refused("change the root's owner", libc::SYS_fchownat, &[CWD, T(c"/"), N(0), N(0), N(0)], Some("EROFS")),
    refused("set an attribute", libc::SYS_setxattr, &[T(c"/"), T(c"user.a"), Z, N(1), N(0)], Some("EROFS")),
    refused("make the image longer", libc::SYS_ftruncate, &[File, N(TOO_FAR + 1)], Some("EFBIG")),
    refused("give the image blocks", libc::SYS_fallocate, &[File, N(0), N(0), N(TOO_FAR + 1)], Some("EFBIG")),
    refused("open by handle", libc::SYS_open_by_handle_at, &[File, HANDLE, N(0)], Some("EPERM")),
    refused("have a file in memory", libc::SYS_memfd_create, &[T(c"x"), N(0)], Some("EMFILE")),
    refused("copy a descriptor", libc::SYS_dup, &[N(0)], Some("EMFILE")),
    refused("make a pipe", libc::SYS_pipe2, &[Z, N(0)], Some("EMFILE")),
    refused("control a descriptor", libc::SYS_ioctl, &[N(0), N(0x5412), Z], None),
    refused("map a file", libc::SYS_mmap, &[N(0), N(4096), N(1), N(1), File, N(0)], None),
    refused("execute a program", libc::SYS_execve, &[T(c"/bin/sh"), Z, Z], Some("ENOENT")),
    refused("execute by descriptor", libc::SYS_execveat, &[File, T(c""), Z, Z, N(0x1000)], Some("EACCES")),
    // Mounts.
    refused("mount", libc::SYS_mount, &[T(c"x"), T(c"/"), T(c"tmpfs"), N(0), N(0)], Some("EPERM")),
    refused("unmount", libc::SYS_umount2, &[T(c"/"), N(2)], Some("EPERM")),
    refused("open a file system", libc::SYS_fsopen, &[T(c"tmpfs"), N(0)], Some("EPERM")),
    refused("clone a mount", libc::SYS_open_tree, &[CWD, T(c"/"), N(1)], Some("EPERM")),
    refused("move a mount", libc::SYS_move_mount, &[CWD, T(c"/"), CWD, T(c"/"), N(0)], Some("EPERM")),
    refused("change a mount", libc::SYS_mount_setattr, &[CWD, T(c"/"), N(0), Z, N(32)], None),
    refused("pivot", libc::SYS_pivot_root, &[T(c"/"), T(c"/")], Some("EPERM")),
    refused("change the root", libc::SYS_chroot, &[T(c"/")], Some("EPERM")),
    // Namespaces.
    refused("a user namespace", libc::SYS_unshare, &[flags(CLONE_NEWUSER)], None),
    refused("a network namespace", libc::SYS_unshare, &[flags(CLONE_NEWNET)], Some("EPERM")),
    refused("a mount namespace", libc::SYS_unshare, &[flags(CLONE_NEWNS)], Some("EPERM")),
    refused("a PID namespace", libc::SYS_unshare, &[flags(CLONE_NEWPID)], Some("EPERM")),
    refused("enter a namespace", libc::SYS_setns, &[File, N(0)], Some("EINVAL")),
    // Networks.
    refused("socket AF_UNIX", libc::SYS_socket, &[family(libc::AF_UNIX), STREAM, N(0)], Some("EMFILE")),
    refused("socket AF_INET", libc::SYS_socket, &[family(libc::AF_INET), STREAM, N(0)], Some("EMFILE")),
    refused("socket AF_INET6", libc::SYS_socket, &[family(libc::AF_INET6), STREAM, N(0)], Some("EMFILE")),
    refused("raw socket", libc::SYS_socket, &[family(libc::AF_INET), RAW, N(1)], Some("EPERM")),
    refused("socket AF_PACKET", libc::SYS_socket, &[family(libc::AF_PACKET), RAW, N(0)], Some("EPERM")),
    refused("socket AF_NETLINK", libc::SYS_socket, &[family(libc::AF_NETLINK), RAW, N(0)], Some("EMFILE")),
    refused("socket AF_VSOCK", libc::SYS_socket, &[family(libc::AF_VSOCK), STREAM, N(0)], None),
    refused("socket AF_ALG", libc::SYS_socket, &[family(libc::AF_ALG), N(5), N(0)], None),
    refused("socket AF_XDP", libc::SYS_socket, &[family(libc::AF_XDP), RAW, N(0)], None),
    refused("socket AF_TIPC", libc::SYS_socket, &[family(libc::AF_TIPC), STREAM, N(0)], None),
    refused("socketpair", libc::SYS_socketpair, &[family(libc::AF_UNIX), STREAM, N(0), Z], Some("EMFILE")),
    refused("connect", libc::SYS_connect, &[N(0), Z, N(16)], None),
    refused("bind", libc::SYS_bind, &[N(0), Z, N(16)], None),
    refused("listen", libc::SYS_listen, &[N(0), N(1)], None),
    refused("send a descriptor", libc::SYS_sendmsg, &[N(0), Z, N(0)], None),
    refused("take a descriptor", libc::SYS_recvmsg, &[N(0), Z, N(0x40)], None),
    refused("socket options", libc::SYS_setsockopt, &[N(0), N(1), N(1), Z, N(4)], None),
    // Processes.
    refused("fork", libc::SYS_clone, &[N(17), N(0), N(0), N(0), N(0)], Some("EAGAIN")),
    refused("a thread", libc::SYS_clone3, &[Z, N(64)], Some("EAGAIN")),
    refused("kill another", libc::SYS_kill, &[OTHER, N(9)], Some("ESRCH")),
    refused("kill all", libc::SYS_kill, &[N(-1), N(9)], Some("ESRCH")),
    refused("signal a thread", libc::SYS_tgkill, &[OTHER, OTHER, N(9)], Some("ESRCH")),
    refused("trace another", libc::SYS_ptrace, &[N(16), OTHER, N(0), N(0)], Some("ESRCH")),
    refused("be traced", libc::SYS_ptrace, &[N(0), N(0), N(0), N(0)], None),
    refused("read another's memory", libc::SYS_process_vm_readv, &[OTHER, PIECE, N(1), PIECE, N(1), N(0)], Some("ESRCH")),
    refused("write another's memory", libc::SYS_process_vm_writev, &[OTHER, PIECE, N(1), PIECE, N(1), N(0)], Some("ESRCH")),
    refused("hold another process", libc::SYS_pidfd_open, &[OTHER, N(0)], Some("ESRCH")),
    refused("take its descriptor", libc::SYS_pidfd_getfd, &[N(0), N(0), N(0)], None),
    refused("compare processes", libc::SYS_kcmp, &[SELF, OTHER, N(0), N(0), N(0)], None),
    refused("limit another", libc::SYS_prlimit64, &[OTHER, N(7), Z, N(0)], Some("ESRCH")),
    refused("raise a limit", libc::SYS_prlimit64, &[N(0), N(9), B(b"\xff\xff\xff\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x7f"), N(0)], Some("EPERM")),
    refused("run first", libc::SYS_setpriority, &[N(0), N(0), N(-20)], Some("EACCES")),
    refused("run in real time", libc::SYS_sched_setscheduler, &[N(0), N(1), B(b"\x01\x00\x00\x00")], Some("EPERM")),
    refused("wait for a lock", libc::SYS_futex, &[Z, N(1), N(1)], None),
    // Users and rights.
    refused("become root", libc::SYS_setuid, &[N(0)], Some("EPERM")),
    refused("take root's group", libc::SYS_setgid, &[N(0)], Some("EPERM")),
    refused("take all three users", libc::SYS_setresuid, &[N(0), N(0), N(0)], Some("EPERM")),
    refused("take groups", libc::SYS_setgroups, &[N(1), Z], Some("EPERM")),
    refused("take capabilities", libc::SYS_capset, &[B(b"\x22\x05\x08\x20\x00\x00\x00\x00"), B(b"\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00")], Some("EPERM")),
    refused("take secure bits", libc::SYS_prctl, &[N(28), N(1), N(0), N(0), N(0)], Some("EPERM")),
    refused("undo no_new_privs", libc::SYS_prctl, &[N(38), N(0), N(0), N(0), N(0)], Some("EINVAL")),
    refused("outlive the daemon", libc::SYS_prctl, &[N(1), N(0), N(0), N(0), N(0)], Some("done")),
    refused("replace the filter", libc::SYS_seccomp, &[N(1), N(0), Z], None),
    // The kernel.
    refused("bpf", libc::SYS_bpf, &[N(0), Z, N(64)], None),
    refused("perf_event_open", libc::SYS_perf_event_open, &[Z, N(0), N(-1), N(-1), N(0)], None),
    refused("userfaultfd", libc::SYS_userfaultfd, &[N(1)], None),
    refused("io_uring_setup", libc::SYS_io_uring_setup, &[N(8), Z], None),
    refused("keyctl", libc::SYS_keyctl, &[N(0), N(-3), N(0)], None),
    refused("add a key", libc::SYS_add_key, &[T(c"user"), T(c"k"), Z, N(4), N(-3)], None),
    refused("request a key", libc::SYS_request_key, &[T(c"user"), T(c"k"), N(0), N(0)], None),
    refused("load a module", libc::SYS_init_module, &[Z, N(64), T(c"")], None),
    refused("load a module by descriptor", libc::SYS_finit_module, &[File, T(c""), N(0)], None),
    refused("load a kernel", libc::SYS_kexec_load, &[N(0), N(0), N(0), N(0)], None),
    refused("reboot", libc::SYS_reboot, &[N(0xfee1_dead), N(0x2812_1969), N(0x0123_4567), N(0)], Some("EPERM")),
    refused("swap", libc::SYS_swapon, &[T(c"/new"), N(0)], Some("EPERM")),
    refused("account processes", libc::SYS_acct, &[T(c"/new")], Some("EPERM")),
    refused("set the clock", libc::SYS_clock_settime, &[N(0), Z], Some("EPERM")),
    refused("set the host's name", libc::SYS_sethostname, &[T(c"x"), N(1)], Some("EPERM")),
    refused("read the kernel's log", libc::SYS_syslog, &[N(3), Z, N(4096)], None),
    refused("clear the kernel's log", libc::SYS_syslog, &[N(5), N(0), N(0)], Some("EPERM")),
    refused("hang up the terminal", libc::SYS_vhangup, &[], Some("EPERM")),
    refused("set quotas", libc::SYS_quotactl, &[N(0), Z, N(0), Z], None),
    refused("watch files", libc::SYS_inotify_init1, &[N(0)], Some("EMFILE")),
    refused("change the execution domain", libc::SYS_personality, &[N(0x004_0000)], None),
    refused("shared memory of System V", libc::SYS_shmget, &[N(0), N(4096), N(0o1600)], None),
    refused("time", libc::SYS_clock_nanosleep, &[N(0), N(0), Z, N(0)], None),
    // Memory.
    refused("memory to run", libc::SYS_mmap, &[N(0), N(4096), N(RX), N(PRIVATE), N(-1), N(0)], Some("done")),
    refused("make memory run", libc::SYS_mprotect, &[N(0), N(0), N(RX)], Some("done")),
    refused("lock memory", libc::SYS_mlockall, &[N(1)], Some("EPERM")),
    limited("memory beyond the limit", Make::Call(libc::SYS_mmap, &[N(0), N(TOO_MUCH), N(RW), N(PRIVATE), N(-1), N(0)]), "ENOMEM"),
    limited("a file beyond the limit", Make::Behind((libc::SYS_lseek, &[File, N(TOO_FAR), N(0)]), (libc::SYS_write, &[File, Z, N(1)])), "EFBIG"),
    limited("its own image", Make::Call(libc::SYS_write, &[File, Z, N(4096)]), "done"),
    // Other tables of system calls.
    #[cfg(target_arch = "x86_64")]
    refused("x32", 0x4000_0000 + libc::SYS_getpid, &[], None),
    #[cfg(target_arch = "x86_64")]
    Attempt { name: "32 bits", make: Make::Call32, jailed: KILLED, bare: None },
    #[cfg(target_arch = "x86_64")]
    refused("ports", libc::SYS_iopl, &[N(3)], None),
    #[cfg(target_arch = "x86_64")]
    refused("some ports", libc::SYS_ioperm, &[N(0x70), N(2), N(1)], None),
    #[cfg(target_arch = "x86_64")]
    refused("segments", libc::SYS_modify_ldt, &[N(1), Z, N(16)], None),
    #[cfg(target_arch = "x86_64")]
    refused("open, the old way", libc::SYS_open, &[PASSWD, N(0)], Some("EMFILE")),
    #[cfg(target_arch = "x86_64")]
    refused("fork, the old way", libc::SYS_fork, &[], Some("EAGAIN")),
    refused("a call that does not exist", 4000, &[], Some("ENOSYS")),
];
