//! The calls of the monitor's threads and of the file server.
//!
//! By then each has all that it works with: what is left is to read, write and
//! wait. No list has a call that finds a file by its path, makes a socket to
//! somewhere, starts a program or enters a namespace, but for the file server's,
//! whose paths are the guest's and whose root is the pod's shared directory.
//!
//! A call that a list lacks is answered EPERM and ends the pod, which then says
//! what thread made which call ([`super::trap`]).

use std::io;

use libc::{c_int, c_ulong};
use nix::errno::Errno;
use vmm_client::Confinement;

use super::{Answer, Check, List, Program, arg, is_supported};
use crate::confinement::{Lacking, go_without};

/// What a thread is there for. Those that it starts are as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Role {
    /// The main thread, once the guest runs.
    Supervisor = 1,
    /// The devices that never wait: net, vsock, entropy, balloon.
    Devices,
    Disks,
    /// The monitor's half of virtio-fs.
    SharedDir,
    /// What writes containers' logs.
    Logs,
    /// A processor of a `kvm` guest.
    Vcpu,
    /// A process of its own: [`crate::files`].
    FileServer,
}

impl Role {
    pub const ALL: [Self; 7] = [
        Self::Supervisor,
        Self::Devices,
        Self::Disks,
        Self::SharedDir,
        Self::Logs,
        Self::Vcpu,
        Self::FileServer,
    ];

    /// In lists of threads, numbers of processors apart.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Supervisor => "supervisor",
            Self::Devices => "devices",
            Self::Disks => "disks",
            Self::SharedDir => "shared-dir",
            Self::Logs => "logs",
            Self::Vcpu => "vcpu",
            Self::FileServer => crate::files::NAME,
        }
    }

    pub(super) fn of_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|role| *role as u16 == number)
    }
}

/// How a thread takes its filter: [`confine`], or [`leave_open`] where the
/// node's kernel has none.
pub type Confine = fn(Role) -> io::Result<()>;

/// Keeps the calling thread, and what it starts, to the calls of its role.
pub fn confine(role: Role) -> io::Result<()> {
    Program::new(&of(role)).install()
}

pub fn leave_open(_: Role) -> io::Result<()> {
    Ok(())
}

/// How threads take their filters on this node. Fails where its kernel has none
/// and that is not to be done without.
pub fn of_node(wanted: Confinement) -> Result<Confine, Lacking> {
    if is_supported() {
        return Ok(confine);
    }
    go_without(
        wanted,
        "the node's kernel has no seccomp filters, so all its system calls are open",
    )?;
    Ok(leave_open)
}

/// The list of a role, in this process.
#[must_use]
pub fn of(role: Role) -> List {
    let list = every(List::new(Answer::Trap(role as u16)));
    match role {
        Role::Supervisor => supervisor(monitor(list)),
        Role::Devices => devices(monitor(list)),
        Role::Disks => disks(monitor(list)),
        Role::SharedDir => shared_dir(monitor(list)),
        Role::Logs => logs(monitor(list)),
        Role::Vcpu => vcpu(monitor(list)),
        Role::FileServer => file_server(list),
    }
}

/// Nobody in the monitor looks at a file that is not open.
fn monitor(list: List) -> List {
    list.allow_if("statx", OPEN_FILE)
}

/// Memory, locks, time, a word for the log, and an end.
fn every(list: List) -> List {
    list.allow(&[
        "write",
        "close",
        "brk",
        "munmap",
        "madvise",
        "futex",
        "clock_gettime",
        "rt_sigprocmask",
        "rt_sigreturn",
        "sigaltstack",
        "exit",
        // The log is cut when it is long: see `crate::bounded`.
        "pread64",
        "ftruncate",
    ])
    .allow_if("mmap", &[NOT_TO_BE_RUN])
    // How libc aborts, and how a processor is told to leave the guest.
    .allow(&["getpid", "gettid"])
    .allow_if("tgkill", &[&[arg(0).is_int(own_pid())]])
}

/// What reads, waits, and may have to wait again after it was stopped.
fn reader(list: List) -> List {
    list.allow(&[
        "read",
        // By a channel whose other end is busy.
        "sched_yield",
        "mremap",
        "getrandom",
        "restart_syscall",
        "exit_group",
        "sendmsg",
        "recvmsg",
    ])
}

/// What waits for events of sockets.
fn event_loop(list: List) -> List {
    reader(list)
        .allow(&["epoll_wait", "epoll_ctl", "accept4"])
        .allow_if("recvfrom", CONNECTED)
        .allow_if("fcntl", FLAGS)
}

/// What serves queues, of a guest that may be at the other end of a socket.
fn queues(list: List) -> List {
    event_loop(list).allow_if("sendto", CONNECTED)
}

/// A thread, and nothing else, may be started; by clone, whose flags can be seen.
fn threads(list: List) -> List {
    list.allow(&["rseq"])
        .allow_if("mprotect", &[NOT_TO_BE_RUN])
        .allow_if("clone", &[&[arg(0).is(THREAD)]])
        .allow_if("prctl", &[&[arg(0).is_int(libc::PR_SET_NAME)]])
        .refuse(&["clone3"], Errno::ENOSYS)
        // Not missed by libc.
        .refuse(&["set_robust_list", "sched_getaffinity"], Errno::ENOSYS)
}

fn supervisor(list: List) -> List {
    threads(event_loop(list))
        .allow(&["wait4"])
        // The guest's kernel, a child.
        .allow_if("kill", &[&[arg(1).is_int(libc::SIGKILL)]])
        .allow_if("ioctl", NOTIFICATIONS)
}

fn devices(list: List) -> List {
    queues(list)
        .allow(&["readv", "writev", "shutdown"])
        .allow_if("socketpair", UNIX_STREAM)
        .allow_if("ioctl", &[NOT_TO_WAIT, OFFLOADS, QUEUE])
}

fn disks(list: List) -> List {
    threads(queues(list))
        .allow_if("ioctl", &[NOT_TO_WAIT])
        .allow(&[
            "writev",
            "preadv2",
            "pwritev2",
            "pwrite64",
            "fdatasync",
            "fallocate",
            "lseek",
            "timerfd_settime",
        ])
}

fn shared_dir(list: List) -> List {
    queues(list)
        .allow(&["preadv2", "pwritev2", "writev"])
        .allow_if("ioctl", &[NOT_TO_WAIT])
}

fn logs(list: List) -> List {
    event_loop(list)
        .allow(&["lseek"])
        .allow_if("ioctl", &[NOT_TO_WAIT])
}

/// It runs the guest, and sets its devices up for it.
fn vcpu(list: List) -> List {
    list.allow(&["epoll_ctl"])
        // A channel goes on without it.
        .refuse(&["sched_yield"], Errno::ENOSYS)
        .allow_if("ioctl", &[&[arg(1).is_int(KVM_RUN)], OFFLOADS, QUEUE])
}

/// What the `virtiofsd` library makes of requests (FUSE has no more of them), for
/// whom names are those below its root.
fn file_server(list: List) -> List {
    reader(list)
        .allow(&[
            "dup",
            "openat",
            "openat2",
            "newfstatat",
            "fstat",
            "statx",
            "fstatfs",
            "getdents64",
            "readlinkat",
            "lseek",
            "mkdirat",
            "unlinkat",
            "linkat",
            "symlinkat",
            "renameat",
            "renameat2",
            "fchmod",
            "fchmodat",
            "fchownat",
            "utimensat",
            "fallocate",
            "fsync",
            "fdatasync",
            "syncfs",
            "copy_file_range",
            "readv",
            "preadv2",
            "writev",
            "pwritev2",
            "getxattr",
            "setxattr",
            "listxattr",
            "removexattr",
            "fgetxattr",
            "fsetxattr",
            "flistxattr",
            "fremovexattr",
            "fchdir",
            "umask",
            // To act as the guest's user, and back.
            "geteuid",
            "getegid",
            "setresuid",
            "setresgid",
            "setgroups",
            "capget",
            "capset",
        ])
        .allow_if("mknodat", NO_DEVICE)
        .allow_if("fcntl", &[&[arg(1).is_int(libc::F_DUPFD_CLOEXEC)]])
}

fn own_pid() -> c_int {
    std::process::id().cast_signed()
}

const NOT_TO_BE_RUN: &[Check] = &[arg(2).has_none_of(libc::PROT_EXEC as c_ulong)];

/// As libc starts threads.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

const FLAGS: &[&[Check]] = &[
    &[arg(1).is_int(libc::F_GETFL)],
    &[arg(1).is_int(libc::F_SETFL)],
];

/// Of a descriptor: the path beside it is empty.
const OPEN_FILE: &[&[Check]] = &[&[arg(2).is_int(libc::AT_EMPTY_PATH)]];

/// No other address beside the descriptor.
const CONNECTED: &[&[Check]] = &[&[arg(4).is(0)]];

const NOT_TO_WAIT: &[Check] = &[arg(1).is_int(libc::FIONBIO as c_int)];

/// Of the pod's tap, as its driver sets it up.
const OFFLOADS: &[Check] = &[arg(1).is_int(libc::TUNSETOFFLOAD as c_int)];
const QUEUE: &[Check] = &[arg(1).is_int(libc::TUNSETQUEUE as c_int)];

const UNIX_STREAM: &[&[Check]] = &[&[
    arg(0).is_int(libc::AF_UNIX),
    arg(1).is_int(libc::SOCK_STREAM | libc::SOCK_CLOEXEC),
    arg(2).is_int(0),
]];

/// linux/seccomp.h: SECCOMP_IOCTL_NOTIF_RECV and _SEND.
const NOTIFICATIONS: &[&[Check]] = &[
    &[arg(1).is_int(0xc050_2100_u32.cast_signed())],
    &[arg(1).is_int(0xc018_2101_u32.cast_signed())],
];

/// A mark of a deleted file apart, which is a character device that opens for
/// nobody: see `files::checked`.
const NO_DEVICE: &[&[Check]] = &[
    &[file_type(0)],
    &[file_type(libc::S_IFREG)],
    &[file_type(libc::S_IFIFO)],
    &[file_type(libc::S_IFSOCK)],
    &[file_type(libc::S_IFCHR), arg(3).is_int(0)],
];

const fn file_type(wanted: libc::mode_t) -> Check {
    arg(2).masked(libc::S_IFMT as u64, wanted as u64)
}

/// linux/kvm.h.
const KVM_RUN: c_int = 0xae80;
