//! What whoever has taken over a thread of the pod's processes would try.

use libc::{
    AF_ALG, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_UNIX, AF_VSOCK, AT_EMPTY_PATH, AT_FDCWD,
    CLONE_FILES, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, O_CREAT, O_DIRECTORY,
    O_RDONLY, O_RDWR, O_WRONLY, S_IFBLK, S_IFCHR, SIGCHLD, SIGKILL, SOCK_DGRAM, SOCK_RAW,
    SOCK_SEQPACKET, SOCK_STREAM,
};

use crate::taken::Arg::{self, Number, Page, Text, Words, Zeroes};

pub struct Attempt {
    pub name: &'static str,
    /// The call's.
    pub call: &'static str,
    pub args: Vec<Arg>,
}

fn n(number: impl Into<i64>) -> Arg {
    Number(number.into())
}

fn of(name: &'static str, call: &'static str, args: impl Into<Vec<Arg>>) -> Attempt {
    Attempt {
        name,
        call,
        args: args.into(),
    }
}

fn open(name: &'static str, path: &'static str, flags: i32) -> Attempt {
    of(
        name,
        "openat",
        [n(AT_FDCWD), Text(path), n(flags), n(0o600)],
    )
}

fn socket(name: &'static str, family: i32, kind: i32, protocol: i32) -> Attempt {
    of(name, "socket", [n(family), n(kind), n(protocol)])
}

#[must_use]
pub fn all() -> Vec<Attempt> {
    [
        files(),
        proc(),
        namespaces(),
        sockets(),
        processes(),
        kernel(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn files() -> Vec<Attempt> {
    let here = n(AT_FDCWD);
    vec![
        open("open the root", "/", O_RDONLY | O_DIRECTORY),
        open(
            "open the daemon's root",
            "/proc/1/root",
            O_RDONLY | O_DIRECTORY,
        ),
        open("open a file of the node", "/etc/shadow", O_RDONLY),
        open("open a device of the node", "/dev/kmsg", O_RDWR),
        open("leave the root", "../../../../etc/passwd", O_RDONLY),
        open("create a file", "/made", O_CREAT | O_WRONLY),
        open("write into /run", "/run/x", O_CREAT | O_WRONLY),
        open("write into /tmp", "/tmp/x", O_CREAT | O_WRONLY),
        of(
            "openat2",
            "openat2",
            [here, Text("/"), Words(&[0, 0, 0]), n(24)],
        ),
        of(
            "make a disk",
            "mknodat",
            [here, Text("/disk"), n(S_IFBLK | 0o600), n(0x800)],
        ),
        of(
            "make a memory device",
            "mknodat",
            [here, Text("/mem"), n(S_IFCHR | 0o600), n(0x101)],
        ),
        of(
            "mark a file as deleted",
            "mknodat",
            [here, Text("/mark"), n(S_IFCHR), n(0)],
        ),
        of("mkdir", "mkdirat", [here, Text("/directory"), n(0o700)]),
        of("symlink", "symlinkat", [Text("/"), here, Text("/link")]),
        of(
            "link",
            "linkat",
            [here, Text("/made"), here, Text("/hard"), n(0)],
        ),
        of(
            "rename",
            "renameat2",
            [here, Text("/none"), here, Text("/other"), n(0)],
        ),
        of("unlink", "unlinkat", [here, Text("/none"), n(0)]),
        of("chmod", "fchmodat", [here, Text("/none"), n(0o777)]),
        of("chown", "fchownat", [here, Text("/none"), n(0), n(0), n(0)]),
        of("truncate", "truncate", [Text("/none"), n(0)]),
        of(
            "setxattr",
            "setxattr",
            [Text("/none"), Text("user.x"), Text("x"), n(1), n(0)],
        ),
        of(
            "stat",
            "newfstatat",
            [here, Text("/none"), Zeroes(256), n(0)],
        ),
        of(
            "statx",
            "statx",
            [here, Text("/none"), n(0), n(0), Zeroes(256)],
        ),
        of(
            "readlink",
            "readlinkat",
            [here, Text("/none"), Zeroes(64), n(64)],
        ),
        of(
            "name_to_handle_at",
            "name_to_handle_at",
            [here, Text("/"), Words(&[128, 0]), Zeroes(8), n(0)],
        ),
        of(
            "open_by_handle_at",
            "open_by_handle_at",
            [here, Words(&[8 | 1 << 32, 0]), n(O_RDONLY)],
        ),
        of("inotify", "inotify_init1", [n(0)]),
        of("fanotify", "fanotify_init", [n(0), n(O_RDONLY)]),
        of("execve", "execve", [Text("/bin/sh"), Zeroes(8), Zeroes(8)]),
        of(
            "execveat",
            "execveat",
            [
                here,
                Text("/bin/sh"),
                Zeroes(8),
                Zeroes(8),
                n(AT_EMPTY_PATH),
            ],
        ),
        of("memfd_create", "memfd_create", [Text("x"), n(0)]),
        of("memfd_secret", "memfd_secret", [n(0)]),
    ]
}

fn proc() -> Vec<Attempt> {
    vec![
        open("read /proc/1/mem", "/proc/1/mem", O_RDONLY),
        open("read its own memory's map", "/proc/self/maps", O_RDONLY),
        open("read /proc/kcore", "/proc/kcore", O_RDONLY),
        open("read /proc/keys", "/proc/keys", O_RDONLY),
        open(
            "write core_pattern",
            "/proc/sys/kernel/core_pattern",
            O_WRONLY,
        ),
        open("write sysrq-trigger", "/proc/sysrq-trigger", O_WRONLY),
        open(
            "write a cgroup's release_agent",
            "/sys/fs/cgroup/release_agent",
            O_WRONLY,
        ),
        open("reopen standard input", "/proc/self/fd/0", O_RDWR),
    ]
}

fn namespaces() -> Vec<Attempt> {
    let here = n(AT_FDCWD);
    let clone = |name, flags: i32| of(name, "clone", [n(flags), n(0), n(0), n(0), n(0)]);
    vec![
        of("unshare user", "unshare", [n(CLONE_NEWUSER)]),
        of(
            "unshare user and net",
            "unshare",
            [n(CLONE_NEWUSER | CLONE_NEWNET)],
        ),
        of("unshare mount", "unshare", [n(CLONE_NEWNS)]),
        of("unshare pid", "unshare", [n(CLONE_NEWPID)]),
        of("unshare files", "unshare", [n(CLONE_FILES)]),
        of("setns", "setns", [n(0), n(0)]),
        clone("clone a process", SIGCHLD),
        clone("clone user", CLONE_NEWUSER | SIGCHLD),
        of("fork", "fork", []),
        of("vfork", "vfork", []),
        of(
            "clone3",
            "clone3",
            [Words(&[0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0]), n(88)],
        ),
        of(
            "mount",
            "mount",
            [Text("x"), Text("/tmp"), Text("tmpfs"), n(0), n(0)],
        ),
        of("umount", "umount2", [Text("/"), n(2)]),
        of("open_tree", "open_tree", [here, Text("/"), n(1)]),
        of(
            "move_mount",
            "move_mount",
            [here, Text("/tmp"), here, Text("/run"), n(0)],
        ),
        of("fsopen", "fsopen", [Text("tmpfs"), n(0)]),
        of(
            "mount_setattr",
            "mount_setattr",
            [here, Text("/"), n(0), Zeroes(32), n(32)],
        ),
        of("pivot_root", "pivot_root", [Text("/"), Text("/tmp")]),
        of("chroot", "chroot", [Text("/tmp")]),
        of("sethostname", "sethostname", [Text("x"), n(1)]),
    ]
}

fn sockets() -> Vec<Attempt> {
    vec![
        socket("socket inet", AF_INET, SOCK_DGRAM, 0),
        socket("socket inet6", AF_INET6, SOCK_STREAM, 0),
        socket("socket packet", AF_PACKET, SOCK_RAW, 0),
        socket("socket netlink route", AF_NETLINK, SOCK_RAW, 0),
        socket("socket netlink audit", AF_NETLINK, SOCK_RAW, 9),
        socket("socket netlink netfilter", AF_NETLINK, SOCK_RAW, 12),
        socket("socket vsock", AF_VSOCK, SOCK_STREAM, 0),
        socket("socket alg", AF_ALG, SOCK_SEQPACKET, 0),
        socket("socket unix", AF_UNIX, SOCK_STREAM, 0),
        of("connect", "connect", [n(0), Text("\u{1}"), n(2)]),
        of("bind", "bind", [n(0), Text("\u{1}"), n(2)]),
        of("listen", "listen", [n(0), n(1)]),
        of(
            "socketpair of datagrams",
            "socketpair",
            [n(AF_UNIX), n(SOCK_DGRAM), n(0), Zeroes(8)],
        ),
    ]
}

fn processes() -> Vec<Attempt> {
    let prctl =
        |name, option: i32, value: i64| of(name, "prctl", [n(option), n(value), n(0), n(0), n(0)]);
    vec![
        of("ptrace", "ptrace", [n(16), n(1), n(0), n(0)]),
        of(
            "process_vm_readv",
            "process_vm_readv",
            [n(1), Zeroes(16), n(1), Zeroes(16), n(1), n(0)],
        ),
        of(
            "process_vm_writev",
            "process_vm_writev",
            [n(1), Zeroes(16), n(1), Zeroes(16), n(1), n(0)],
        ),
        of("pidfd_open", "pidfd_open", [n(1), n(0)]),
        of("pidfd_getfd", "pidfd_getfd", [n(0), n(0), n(0)]),
        of("kcmp", "kcmp", [n(1), n(1), n(0), n(0), n(0)]),
        of("signal everyone", "kill", [n(-1), n(0)]),
        of(
            "signal a thread of another process",
            "tgkill",
            [n(4_000_000), n(4_000_000), n(SIGKILL)],
        ),
        of("tkill", "tkill", [n(4_000_000), n(SIGKILL)]),
        of(
            "limits of another",
            "prlimit64",
            [n(1), n(7), Words(&[1 << 20, 1 << 20]), n(0)],
        ),
        of(
            "sched fifo",
            "sched_setscheduler",
            [n(0), n(1), Words(&[1])],
        ),
        of("nice -20", "setpriority", [n(0), n(0), n(-20)]),
        of("ioprio", "ioprio_set", [n(1), n(0), n(1 << 13)]),
        of(
            "process_madvise",
            "process_madvise",
            [n(-1), n(0), n(0), n(0), n(0)],
        ),
        of("setuid 0", "setuid", [n(0)]),
        of("setgid 0", "setgid", [n(0)]),
        of(
            "take back capabilities",
            "capset",
            [
                Words(&[0x2008_0522]),
                Words(&[u64::MAX, u64::MAX, u64::MAX]),
            ],
        ),
        prctl("prctl dumpable", 4, 1),
        prctl("prctl seccomp", 22, 1),
        prctl("prctl securebits", 28, 0),
        prctl("prctl mm", 35, 1),
        prctl("prctl speculation", 53, 0),
        of("personality", "personality", [n(-1)]),
        of("another filter", "seccomp", [n(1), n(0), Zeroes(16)]),
        of(
            "a handler of its own",
            "rt_sigaction",
            [n(31), Zeroes(32), n(0), n(8)],
        ),
        of(
            "memory that is run",
            "mmap",
            [n(0), n(4096), n(7), n(0x22), n(-1), n(0)],
        ),
        of("memory that becomes run", "mprotect", [Page, n(4096), n(5)]),
    ]
}

fn kernel() -> Vec<Attempt> {
    vec![
        of("bpf", "bpf", [n(0), Zeroes(72), n(72)]),
        of(
            "perf_event_open",
            "perf_event_open",
            [Zeroes(128), n(0), n(-1), n(-1), n(0)],
        ),
        of("userfaultfd", "userfaultfd", [n(1)]),
        of("io_uring", "io_uring_setup", [n(1), Zeroes(120)]),
        of("io_setup", "io_setup", [n(1), Zeroes(8)]),
        of("keyctl", "keyctl", [n(6), n(-4), n(0), n(0)]),
        of(
            "add_key",
            "add_key",
            [Text("user"), Text("x"), Text("x"), n(1), n(-2)],
        ),
        of(
            "request_key",
            "request_key",
            [Text("user"), Text("x"), n(0), n(-2)],
        ),
        of("quotactl", "quotactl", [n(0), n(0), n(0), n(0)]),
        of(
            "reboot",
            "reboot",
            [n(0xfee1_dead_u32), n(672_274_793), n(0), n(0)],
        ),
        of("init_module", "init_module", [n(0), n(0), Text("")]),
        of("finit_module", "finit_module", [n(0), Text(""), n(0)]),
        of("kexec_load", "kexec_load", [n(0), n(0), n(0), n(0)]),
        of("swapon", "swapon", [Text("/x"), n(0)]),
        of("acct", "acct", [n(0)]),
        of("syslog", "syslog", [n(2), Zeroes(16), n(16)]),
        of("clock_settime", "clock_settime", [n(0), Words(&[1, 0])]),
        of("adjtimex", "adjtimex", [Zeroes(208)]),
        of("mlockall", "mlockall", [n(1)]),
        of("mbind", "mbind", [n(0), n(0), n(0), n(0), n(0), n(0)]),
        of(
            "move_pages",
            "move_pages",
            [n(0), n(0), n(0), n(0), n(0), n(0)],
        ),
        of("shmget", "shmget", [n(0), n(4096), n(0o600)]),
        of("msgget", "msgget", [n(0), n(0o600)]),
        of(
            "mq_open",
            "mq_open",
            [Text("x"), n(O_CREAT), n(0o600), n(0)],
        ),
        of("splice", "splice", [n(0), n(0), n(1), n(0), n(1), n(0)]),
        of("landlock", "landlock_create_ruleset", [n(0), n(0), n(1)]),
        of("ioctl TIOCSTI", "ioctl", [n(0), n(0x5412), Text("x")]),
        of("ioctl FIOASYNC", "ioctl", [n(0), n(0x5452), Words(&[1])]),
        of("fcntl F_SETLEASE", "fcntl", [n(1), n(1024), n(2)]),
        of("fcntl F_SETOWN", "fcntl", [n(0), n(8), n(1)]),
        of("iopl", "iopl", [n(3)]),
        of("modify_ldt", "modify_ldt", [n(0), Zeroes(64), n(64)]),
    ]
}
