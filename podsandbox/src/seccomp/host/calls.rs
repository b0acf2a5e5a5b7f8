//! The system calls of Linux on x86, 32-bit forms included, that containers on
//! the host's kernel may make.
//!
//! Left out, and so refused to everybody: those that reach beyond what a
//! container's namespaces divide or that have been a way out of containers
//! again and again. The kernel's key rings (`add_key`, `keyctl`,
//! `request_key`) are not divided by namespaces; `io_uring_*` makes calls that
//! no filter sees; `userfaultfd` holds the kernel up in the middle of a copy;
//! swap, `kexec_load`, `nfsservctl`, `vm86` and the obsolete calls serve nobody
//! in there.
//!
//! A list is text with its names apart.

use oci_spec::runtime::Capability;

/// What a process may do to itself and what it owns, group by group.
pub(super) const EVERYBODYS: &[&str] = &[
    FILES,
    DIRECTORIES,
    ATTRIBUTES,
    MEMORY,
    PROCESSES,
    IDENTITY,
    SIGNALS,
    TIME,
    SCHEDULING,
    WAITING,
    SOCKETS,
    SYSTEM_V,
    LIMITS_AND_FACTS,
    SELF_RESTRICTION,
    ARCHITECTURE,
];

/// Reading and writing what was opened, and opening what the permissions of
/// its own file tree allow.
const FILES: &str = "\
    open openat openat2 creat close close_range read write readv writev pread64 pwrite64 \
    preadv pwritev preadv2 pwritev2 lseek _llseek dup dup2 dup3 fcntl fcntl64 ioctl flock \
    fsync fdatasync sync syncfs sync_file_range truncate truncate64 ftruncate ftruncate64 \
    fallocate fadvise64 fadvise64_64 readahead sendfile sendfile64 copy_file_range splice \
    tee vmsplice pipe pipe2 memfd_create io_setup io_destroy io_submit io_cancel \
    io_getevents io_pgetevents io_pgetevents_time64 name_to_handle_at cachestat";

/// Names in its own file tree, and notices of their changes, for which
/// `fanotify_init` takes a capability.
const DIRECTORIES: &str = "\
    getdents getdents64 getcwd chdir fchdir mkdir mkdirat rmdir link linkat unlink unlinkat \
    symlink symlinkat rename renameat renameat2 readlink readlinkat mknod mknodat umask \
    access faccessat faccessat2 inotify_init inotify_init1 inotify_add_watch \
    inotify_rm_watch fanotify_mark";

/// What is known of files, and changing it where the owner may.
const ATTRIBUTES: &str = "\
    stat stat64 fstat fstat64 fstatat64 newfstatat lstat lstat64 statx statfs statfs64 \
    fstatfs fstatfs64 statmount listmount chmod fchmod fchmodat fchmodat2 chown chown32 \
    fchown fchown32 fchownat lchown lchown32 utime utimes futimesat utimensat \
    utimensat_time64 getxattr lgetxattr fgetxattr getxattrat setxattr lsetxattr fsetxattr \
    setxattrat listxattr llistxattr flistxattr listxattrat removexattr lremovexattr \
    fremovexattr removexattrat";

/// Its own address space.
const MEMORY: &str = "\
    brk mmap mmap2 munmap mremap mprotect madvise mincore msync mlock mlock2 mlockall \
    munlock munlockall remap_file_pages membarrier memfd_secret pkey_alloc pkey_free \
    pkey_mprotect process_mrelease map_shadow_stack mseal";

/// Making processes, running programs, ending and awaiting them. `clone` has
/// rules of its own. Tracing is allowed since Linux 4.8, where it does not lead
/// around a filter any more; whom one may trace is the kernel's to say.
const PROCESSES: &str = "\
    fork vfork execve execveat exit exit_group wait4 waitid waitpid getpid getppid gettid \
    getpgid getpgrp setpgid getsid setsid ptrace pidfd_open pidfd_send_signal \
    set_tid_address prctl arch_prctl get_thread_area set_thread_area set_robust_list \
    get_robust_list rseq restart_syscall";

/// User and group ids, and capabilities: what may be taken the kernel says.
const IDENTITY: &str = "\
    getuid getuid32 geteuid geteuid32 getgid getgid32 getegid getegid32 getresuid \
    getresuid32 getresgid getresgid32 getgroups getgroups32 setuid setuid32 setgid setgid32 \
    setreuid setreuid32 setregid setregid32 setresuid setresuid32 setresgid setresgid32 \
    setfsuid setfsuid32 setfsgid setfsgid32 setgroups setgroups32 capget capset";

const SIGNALS: &str = "\
    kill tkill tgkill signal signalfd signalfd4 sigaction sigaltstack sigpending sigprocmask \
    sigreturn sigsuspend rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo \
    rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo \
    pause alarm";

/// Reading clocks, and timers of one's own. `adjtimex` and its like only read
/// without the capability.
const TIME: &str = "\
    time times gettimeofday clock_gettime clock_gettime64 clock_getres clock_getres_time64 \
    clock_nanosleep clock_nanosleep_time64 clock_adjtime clock_adjtime64 adjtimex nanosleep \
    getitimer setitimer timer_create timer_delete timer_getoverrun timer_gettime \
    timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime \
    timerfd_gettime64 timerfd_settime timerfd_settime64";

const SCHEDULING: &str = "\
    sched_yield sched_getaffinity sched_setaffinity sched_getattr sched_setattr \
    sched_getparam sched_setparam sched_getscheduler sched_setscheduler \
    sched_get_priority_max sched_get_priority_min sched_rr_get_interval \
    sched_rr_get_interval_time64 getpriority setpriority nice ioprio_get ioprio_set getcpu";

const WAITING: &str = "\
    select _newselect pselect6 pselect6_time64 poll ppoll ppoll_time64 epoll_create \
    epoll_create1 epoll_ctl epoll_ctl_old epoll_wait epoll_wait_old epoll_pwait epoll_pwait2 \
    eventfd eventfd2 futex futex_time64 futex_waitv futex_wait futex_wake futex_requeue";

/// Of the container's network. `socket` has a rule of its own; `socketcall` is
/// all of these for 32-bit programs.
const SOCKETS: &str = "\
    socketcall socketpair bind connect listen accept accept4 getsockname getpeername \
    getsockopt setsockopt send sendto sendmsg sendmmsg recv recvfrom recvmsg recvmmsg \
    recvmmsg_time64 shutdown";

/// Messages, semaphores and memory of the pod's IPC namespace.
const SYSTEM_V: &str = "\
    ipc msgctl msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat \
    shmctl shmdt shmget mq_getsetattr mq_notify mq_open mq_timedreceive \
    mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink";

const LIMITS_AND_FACTS: &str = "\
    getrlimit ugetrlimit setrlimit prlimit64 getrusage sysinfo uname getrandom";

/// What makes a process's rights fewer.
const SELF_RESTRICTION: &str = "\
    seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self";

/// Of x86 alone; the last two are what the kernel puts into a program that it
/// is asked to probe.
const ARCHITECTURE: &str = "\
    modify_ldt uprobe uretprobe";

/// What a capability is for, beyond what the kernel lets everybody do.
pub(super) const BY_CAPABILITY: &[(Capability, &str)] = &[
    (
        Capability::SysAdmin,
        "mount umount umount2 pivot_root mount_setattr move_mount open_tree open_tree_attr \
         fsconfig fsmount fsopen fspick setns unshare sethostname setdomainname bpf \
         perf_event_open fanotify_init quotactl quotactl_fd lookup_dcookie syslog",
    ),
    (Capability::Bpf, "bpf"),
    (Capability::Perfmon, "perf_event_open"),
    (Capability::Syslog, "syslog"),
    (Capability::DacReadSearch, "open_by_handle_at"),
    (
        Capability::SysPtrace,
        "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev",
    ),
    (
        Capability::SysNice,
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    ),
    (
        Capability::SysTime,
        "settimeofday stime clock_settime clock_settime64",
    ),
    (Capability::SysChroot, "chroot"),
    (Capability::SysBoot, "reboot"),
    (
        Capability::SysModule,
        "init_module finit_module delete_module",
    ),
    (Capability::SysPacct, "acct"),
    (Capability::SysRawio, "iopl ioperm"),
    (Capability::SysTtyConfig, "vhangup"),
];
