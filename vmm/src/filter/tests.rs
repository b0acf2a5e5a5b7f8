use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;

use libc::sock_filter;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::EpollFlags;
use nix::sys::prctl::set_no_new_privs;
use proptest::prelude::*;
use proptest::sample::select;
use vmm_client::UmlMode::{self, Ptrace, Seccomp};

use super::*;

const NATIVE: u32 = if cfg!(target_arch = "x86_64") {
    0xc000_003e
} else {
    0xc000_00b7
};
const I386: u32 = 0x4000_0003;
const X32: u32 = 0x4000_0000;

fn every_list() -> Vec<List> {
    let of = |mode| {
        [
            uml::boot(mode, Answer::Ask),
            uml::boot(mode, Answer::Refuse(Errno::EPERM)),
            uml::sealed(mode),
            uml::seal(mode),
        ]
    };
    let roles = Role::ALL.map(super::of);
    [&of(Seccomp)[..], &of(Ptrace), &roles].concat()
}

/// What the kernel makes of a program.
fn run(program: &[sock_filter], arch: u32, number: u32, args: &[u64; 6]) -> u32 {
    let load = |offset: u32| match offset {
        0 => number,
        4 => arch,
        16..64 => {
            let value = args[(offset as usize - 16) / 8];
            if offset.is_multiple_of(8) {
                value as u32
            } else {
                (value >> 32) as u32
            }
        }
        _ => panic!("offset {offset}"),
    };
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let line = &program[at];
        at += 1;
        let over = |yes: bool| usize::from(if yes { line.jt } else { line.jf });
        match u32::from(line.code) {
            0x20 => accumulator = load(line.k),
            0x54 => accumulator &= line.k,
            0x15 => at += over(accumulator == line.k),
            0x35 => at += over(accumulator >= line.k),
            0x05 => at += line.k as usize,
            0x06 => return line.k,
            other => panic!("code {other:#x}"),
        }
    }
}

fn value(answer: Answer) -> u32 {
    match answer {
        Answer::Allow => 0x7fff_0000,
        Answer::Refuse(errno) => 0x0005_0000 | errno as u32,
        Answer::Ask => 0x7fc0_0000,
        Answer::Trap(beside) => 0x0003_0000 | u32::from(beside),
    }
}

/// Arguments as the lists ask for them, and such as differ by a little.
fn arguments() -> impl Strategy<Value = [u64; 6]> {
    let values: Vec<u64> = every_list()
        .iter()
        .flat_map(|list| list.rules.values())
        .flat_map(|rule| rule.cases.iter().flatten())
        .map(|check| check.value)
        .collect();
    let near = (select(values), 0..64u32, any::<bool>());
    let near = near.prop_map(|(value, bit, flip)| value ^ (u64::from(flip) << bit));
    prop::array::uniform6(prop_oneof![4 => near, 1 => any::<u64>()])
}

proptest! {
    #[test]
    fn a_program_answers_as_its_list(args in arguments()) {
        for list in every_list() {
            let program = Program::new(&list);
            for number in 0..600 {
                let expected = value(list.judge(number, &args));
                prop_assert_eq!(run(program.lines(), NATIVE, number, &args), expected);
                let unnamed = value(list.unnamed);
                prop_assert_eq!(run(program.lines(), NATIVE, X32 | number, &args), unnamed);
                prop_assert_eq!(run(program.lines(), I386, number, &args), unnamed);
            }
        }
    }

    #[test]
    fn the_seal_only_takes_away_and_tells_nothing_twice(args in arguments()) {
        for mode in [Seccomp, Ptrace] {
            let (boot, sealed) = (uml::boot(mode, Answer::Ask), uml::sealed(mode));
            let seal = uml::seal(mode);
            for number in 0..600 {
                let [outer, alone, below] =
                    [&boot, &sealed, &seal].map(|list| list.judge(number, &args));
                // Of two answers the kernel takes the more severe one.
                let both = value(outer).min(value(below));
                prop_assert_eq!(both == value(Answer::Allow), alone == Answer::Allow);
                prop_assert!(alone != Answer::Allow || outer == Answer::Allow);
                // What the first list refuses is its own to tell.
                if outer == Answer::Ask && !boot.rules.contains_key(&number) {
                    prop_assert_eq!(both, value(Answer::Ask));
                }
            }
        }
    }
}

#[test]
fn numbers_are_found_by_halves() {
    for list in every_list() {
        let program = Program::new(&list);
        let free = |rule: &&Rule| rule.cases.contains(&Vec::new());
        assert!(list.rules.values().filter(free).count() > 10);
        // Loads, jumps and the answer; a list of a hundred numbers.
        let deepest = (0..600).map(|number| steps(program.lines(), number)).max();
        assert!(deepest <= Some(14), "{deepest:?}");
    }
}

/// Lines until an argument is looked at or the answer is there.
fn steps(program: &[sock_filter], number: u32) -> usize {
    let (mut at, mut steps) = (4, 4);
    loop {
        let line = &program[at];
        steps += 1;
        at += 1;
        match u32::from(line.code) {
            0x35 => at += usize::from(if number >= line.k { line.jt } else { line.jf }),
            0x05 => at += line.k as usize,
            _ => return steps,
        }
    }
}

/// By path, by a network, or a way to more of the node's kernel.
const NEVER_OPEN_SEALED: &[&str] = &[
    "fchmod",
    "open",
    "openat",
    "openat2",
    "creat",
    "stat",
    "lstat",
    "newfstatat",
    "statx",
    "access",
    "faccessat",
    "faccessat2",
    "readlink",
    "readlinkat",
    "execve",
    "chdir",
    "mkdir",
    "mkdirat",
    "rmdir",
    "unlink",
    "unlinkat",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "mknod",
    "mknodat",
    "chmod",
    "fchmod",
    "fchmodat",
    "chown",
    "fchown",
    "fchownat",
    "truncate",
    "ftruncate",
    "statfs",
    "utimensat",
    "name_to_handle_at",
    "open_by_handle_at",
    "setxattr",
    "getxattr",
    "inotify_init1",
    "fanotify_init",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "open_tree",
    "move_mount",
    "fsopen",
    "fsconfig",
    "fsmount",
    "mount_setattr",
    "socket",
    "bind",
    "listen",
    "accept",
    "accept4",
    "connect",
    "setsockopt",
    "sendto",
    "sendmmsg",
    "memfd_create",
    "memfd_secret",
    "mprotect",
    "mremap",
    "pkey_mprotect",
    "remap_file_pages",
    "splice",
    "vmsplice",
    "tee",
    "sendfile",
    "copy_file_range",
    "shmget",
    "semget",
    "msgget",
    "mq_open",
    "io_setup",
    "ioctl",
    "personality",
    "prlimit64",
    "setrlimit",
    "timer_create",
];

const NEVER_OPEN: &[&str] = &[
    "unshare",
    "setns",
    "clone3",
    "fork",
    "vfork",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "open_tree",
    "move_mount",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "mount_setattr",
    "process_vm_readv",
    "process_vm_writev",
    "process_madvise",
    "pidfd_open",
    "pidfd_getfd",
    "pidfd_send_signal",
    "kcmp",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "keyctl",
    "add_key",
    "request_key",
    "bind",
    "listen",
    "accept",
    "accept4",
    "sendto",
    "sendmmsg",
    "recvmmsg",
    "name_to_handle_at",
    "open_by_handle_at",
    "openat2",
    "mknod",
    "mknodat",
    "chown",
    "fchown",
    "lchown",
    "fchownat",
    "chmod",
    "fchmodat",
    "fchmodat2",
    "setxattr",
    "lsetxattr",
    "fsetxattr",
    "getxattr",
    "setuid",
    "setgid",
    "setreuid",
    "setregid",
    "setresuid",
    "setresgid",
    "setgroups",
    "setfsuid",
    "setfsgid",
    "capset",
    "quotactl",
    "swapon",
    "swapoff",
    "kexec_load",
    "kexec_file_load",
    "init_module",
    "finit_module",
    "delete_module",
    "iopl",
    "ioperm",
    "modify_ldt",
    "fanotify_init",
    "inotify_init",
    "inotify_init1",
    "memfd_secret",
    "landlock_create_ruleset",
    "syslog",
    "acct",
    "reboot",
    "sethostname",
    "setdomainname",
    "clock_settime",
    "settimeofday",
    "adjtimex",
    "clock_adjtime",
    "sched_setscheduler",
    "sched_setattr",
    "setpriority",
    "mlock",
    "mlockall",
    "mlock2",
    "mbind",
    "set_mempolicy",
    "migrate_pages",
    "move_pages",
    "ioprio_set",
    "vhangup",
    "lookup_dcookie",
    "shmget",
    "shmat",
    "semget",
    "msgget",
    "mq_open",
    "io_setup",
    "splice",
    "vmsplice",
    "tee",
    "sendfile",
    "ioctl",
];

proptest! {
    #[test]
    fn what_has_no_place_in_a_list_is_refused_with_all_arguments(args in arguments()) {
        for mode in [Seccomp, Ptrace] {
            for (list, never) in [
                (uml::boot(mode, Answer::Ask), NEVER_OPEN),
                (uml::sealed(mode), NEVER_OPEN),
                (uml::sealed(mode), NEVER_OPEN_SEALED),
            ] {
                for name in never {
                    let number = number(name).unwrap();
                    prop_assert!(list.judge(number, &args) != Answer::Allow, "{}", name);
                }
            }
        }
    }
}

#[test]
fn the_documentation_has_the_open_calls() {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/vmm.md");
    let document = fs::read_to_string(document).unwrap();
    // Lines are broken as their writer likes.
    let document = document.split_whitespace().collect::<Vec<_>>().join(" ");
    for mode in [Seccomp, Ptrace] {
        let expected = documented(mode);
        assert!(
            document.contains(&expected),
            "docs/vmm.md lacks: {expected}"
        );
    }
}

fn documented(mode: UmlMode) -> String {
    let open: Vec<String> = uml::sealed(mode).open().collect();
    let mode = match mode {
        Seccomp => "seccomp",
        Ptrace => "ptrace",
    };
    format!("Mode `{mode}`, {} calls: {}.", open.len(), open.join(", "))
}

#[test]
fn calls_have_names() {
    for name in ["read", "openat", "io_uring_setup", "execveat"] {
        assert_eq!(super::name(i64::from(number(name).unwrap())), name);
    }
    assert_eq!(number("no_such_call"), None);
    assert_eq!(super::name(100_000), "call 100000");
}

/// On a thread of its own, as the filter stays on it.
fn confined<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = thread::spawn(move || {
        set_no_new_privs().unwrap();
        call()
    });
    thread.join().unwrap()
}

/// Without a filter both fail as well, otherwise.
fn calls() -> [i32; 3] {
    [chroot() as i32, chroot() as i32, swapoff()]
}

fn chroot() -> Errno {
    nix::unistd::chroot("").unwrap_err()
}

#[test]
fn the_kernel_takes_a_program_and_refuses_by_it() {
    let list = List::new(Answer::Allow).refuse(&["chroot"], Errno::EBADE);
    let program = Program::new(&list);
    let error = confined(move || {
        program.install().unwrap();
        chroot()
    });
    assert_eq!(error, Errno::EBADE);
}

fn answer(refusals: &mut Refusals) -> Refused {
    let mut ready = [PollFd::new(refusals.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::NONE).unwrap();
    let told = ready[0].revents().unwrap();
    let as_epoll = EpollFlags::from_bits_retain(told.bits().into());
    refusals.answer(as_epoll).unwrap()
}

/// Allows all but these.
fn asks(names: &[&str]) -> Program {
    let mut list = List::new(Answer::Allow);
    for name in names {
        list.set(
            name,
            Rule {
                cases: Vec::new(),
                otherwise: Answer::Ask,
            },
        );
    }
    Program::new(&list)
}

#[test]
fn whoever_listens_learns_what_was_refused() {
    let program = asks(&["chroot", "swapoff"]);
    let (send, listener) = mpsc::channel();
    let caller = thread::spawn(move || {
        confined(move || {
            send.send(program.install_listening().unwrap()).unwrap();
            calls()
        })
    });
    let mut refusals = Refusals::new(listener.recv().unwrap());
    let mut told = Vec::new();
    loop {
        match answer(&mut refusals) {
            Refused::Enough => break,
            refused => told.push(refused),
        }
    }
    assert_eq!(caller.join().unwrap(), [libc::EPERM; 3]);
    let first = |name: &str| Refused::First(name.to_owned());
    assert_eq!(told, [first("chroot"), Refused::Again, first("swapoff")]);
}

#[test]
fn whoever_asks_without_end_is_refused_without_us() {
    let program = asks(&["chroot"]);
    let (send, listener) = mpsc::channel();
    let caller = thread::spawn(move || {
        confined(move || {
            send.send(program.install_listening().unwrap()).unwrap();
            let mut asked = 0;
            let mut refused = chroot();
            while refused == Errno::EPERM {
                asked += 1;
                refused = chroot();
            }
            (asked, refused)
        })
    });
    let mut refusals = Refusals::new(listener.recv().unwrap());
    while answer(&mut refusals) != Refused::Enough {}
    drop(refusals);
    assert_eq!(caller.join().unwrap(), (1024, Errno::ENOSYS));
}

fn swapoff() -> i32 {
    // SAFETY: the kernel reads a string.
    assert_eq!(unsafe { libc::swapoff(c"".as_ptr()) }, -1);
    Errno::last_raw()
}

/// The numbers are in docs/security.md beside those of others.
#[test]
fn a_thread_of_the_monitor_has_few_calls_and_all_of_them_together_not_many() {
    let open = |role| of(role).open().collect::<BTreeSet<_>>();
    let monitor = Role::ALL.iter().filter(|role| **role != Role::FileServer);
    let all: BTreeSet<_> = monitor.flat_map(|role| open(*role)).collect();
    assert!(open(Role::Vcpu).len() <= 20);
    assert!(all.len() <= 50, "{} {all:?}", all.len());
}

#[test]
fn after_the_seal_few_calls_are_open() {
    for mode in [Seccomp, Ptrace] {
        let count = uml::sealed(mode).open().count();
        assert!(count <= 60, "{count}");
    }
}

/// What a role has and a guest's kernel does not.
fn its_own(role: Role) -> &'static [&'static str] {
    match role {
        Role::FileServer => &[
            "openat2",
            "mknodat",
            "fchownat",
            "fchmodat",
            "setxattr",
            "fsetxattr",
            "getxattr",
            "setresuid",
            "setresgid",
            "setgroups",
            "capset",
        ],
        // Of sockets that are there.
        _ => &["ioctl", "accept4", "sendto"],
    }
}

proptest! {
    #[test]
    fn no_role_of_a_pods_processes_reaches_beyond_what_is_open(args in arguments()) {
        for role in Role::ALL {
            for name in NEVER_OPEN.iter().filter(|name| !its_own(role).contains(name)) {
                let answer = of(role).judge(number(name).unwrap(), &args);
                prop_assert!(answer != Answer::Allow, "{} by {:?}", name, role);
            }
        }
    }
}
