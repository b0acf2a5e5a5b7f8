//! What the guest kernel's process of a `uml` machine can ask of the node, and
//! that its guest does not notice.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use drupe_vmm::filter;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use vmm_client::UmlMode;
use vmm_client::protocol::{EndCause, VmState};

use crate::common::{
    PATIENCE, Pod, Setup, UID, compile, is_file_server, make_initramfs, namespace_of, prepare,
    tempdir, uml_kernel,
};

const MODES: [UmlMode; 2] = [UmlMode::Seccomp, UmlMode::Ptrace];

/// What `jail-probe` says, run in place of a guest's kernel, by attempt; and
/// the monitor's log.
async fn probe(mode: UmlMode, args: &[&str]) -> (BTreeMap<String, String>, String) {
    let dir = tempdir();
    let program = compile("tests/probe/jail-probe.c", dir.path());
    let setup = Setup {
        mode,
        kernel_args: args.iter().map(|&arg| arg.to_owned()).collect(),
        ..Setup::default()
    };
    let (request, _cleanup) = prepare(&program, &setup, dir.path());
    let mut process = vmm_client::spawn(request).await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, process.wait()).await;
    assert!(ended.expect("an attempt hangs").unwrap().success());
    let console = fs::read_to_string(dir.path().join("console.log")).unwrap();
    let mut outcomes = BTreeMap::new();
    let mut count = None;
    for line in console.lines() {
        if let Some(attempt) = line.strip_prefix("probe ") {
            // "signal 9" is the only outcome of two words.
            let (name, outcome) = match attempt.rsplit_once(" signal ") {
                Some((name, signal)) => (name, format!("signal {signal}")),
                None => {
                    let (name, number) = attempt.rsplit_once(' ').unwrap();
                    (name, outcome(number.parse().unwrap()))
                }
            };
            let before = outcomes.insert(name.to_owned(), outcome);
            assert_eq!(before, None, "{name} twice");
        } else if let Some(number) = line.strip_prefix("probes ") {
            count = Some(number.parse().unwrap());
        }
    }
    assert_eq!(count, Some(outcomes.len()), "{console}");
    let log = fs::read_to_string(dir.path().join("vmm.log")).unwrap();
    (outcomes, log)
}

fn outcome(errno: i32) -> String {
    match errno {
        0 => "done".to_owned(),
        errno => format!("{:?}", Errno::from_raw(errno)),
    }
}

/// What is not refused with EPERM after the seal, in both modes.
const NOT_EPERM: &[(&str, &str)] = &[
    // The role's own.
    ("getpid", "done"),
    ("anonymous memory", "done"),
    ("socketpair unix stream", "done"),
    ("getrandom", "done"),
    // Open, within the jail's process ids.
    ("kill a process outside", "ESRCH"),
    // A path beside a descriptor cannot be seen.
    ("execveat of a file that is missing", "ENOENT"),
    // Errors that libc knows.
    ("clone3", "ENOSYS"),
    ("clone3 user", "ENOSYS"),
    ("ioctl TIOCSTI", "ENOTTY"),
    ("ioctl FIONREAD", "ENOTTY"),
];

#[tokio::test]
async fn a_kernel_that_was_taken_over_is_refused_the_node() {
    let Some(_) = uml_kernel() else { return };
    for mode in MODES {
        let (outcomes, log) = probe(mode, &[]).await;
        assert!(outcomes.len() > 150, "{} attempts", outcomes.len());
        let mut expected: BTreeMap<_, _> = outcomes
            .keys()
            .map(|name| (name.clone(), "EPERM".to_owned()))
            .collect();
        for (name, outcome) in NOT_EPERM {
            let before = expected.insert((*name).to_owned(), (*outcome).to_owned());
            assert!(before.is_some(), "no attempt is called {name}");
        }
        assert_eq!(outcomes, expected, "{mode:?}");
        // Some are told, and not more than are read.
        assert!(
            log.contains("refused a system call call=\"open_by_handle_at\""),
            "{log}"
        );
        assert_eq!(log.matches("refused a system call").count(), 16, "{log}");
    }
}

#[tokio::test]
async fn a_kernel_that_keeps_the_calls_of_its_start_makes_no_namespaces_and_no_network() {
    let Some(_) = uml_kernel() else { return };
    for mode in MODES {
        let (outcomes, _) = probe(mode, &["unsealed"]).await;
        let refused = [
            "unshare user",
            "unshare user and net",
            "setns",
            "clone user",
            "clone user as a stub",
            "mount",
            "chroot",
            "mknodat",
            "socket inet",
            "socket netlink netfilter",
            "socket vsock",
            "socket alg",
            "ptrace attach the monitor",
            "process_vm_readv the monitor",
            "pidfd_getfd of the monitor",
            "bpf",
            "perf_event_open",
            "userfaultfd",
            "io_uring",
            "keyctl session",
            "add_key",
            "setuid 0",
            "32-bit call",
            "x32 call",
        ];
        for name in refused {
            assert_eq!(outcomes[name], "EPERM", "{name}, {mode:?}");
        }
        assert_eq!(outcomes["clone a process"], "done");
    }
}

/// The kernel as it is without the patch: the word means nothing to it.
fn without_seal(kernel: &Path, dir: &Path) -> PathBuf {
    let mut bytes = fs::read(kernel).unwrap();
    let word = b"seal=";
    let places: Vec<usize> = (0..bytes.len() - word.len())
        .filter(|&at| &bytes[at..at + word.len()] == word)
        .collect();
    assert!(!places.is_empty(), "this kernel does not know the word");
    for at in places {
        bytes[at] = b'S';
    }
    let path = dir.join("kernel");
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn a_kernel_that_does_not_seal_itself_runs_only_where_it_may() {
    let Some(kernel) = uml_kernel() else { return };
    let dir = tempdir();
    let kernel = without_seal(&kernel, dir.path());
    let setup = |unsealed| Setup {
        unsealed,
        script: "vsock connect 1 </dev/null; sleep 1000",
        ..Setup::default()
    };
    let (reason, cause) = Pod::start(&kernel, setup(false)).await.ended_by().await;
    assert!(
        reason.starts_with("the guest kernel has not given up the system calls of its start"),
        "{reason}"
    );
    assert!(reason.contains("uml-4-seal.patch") && reason.contains("uml_unsealed"));
    assert_eq!(cause, EndCause::Fault);

    let pod = Pod::start(&kernel, setup(true)).await;
    let mut control = pod.control().await;
    let mut events = pod.control().await.subscribe().await.unwrap();
    while control.status().await.unwrap().state != VmState::Ready {
        events.next().await.unwrap();
    }
    assert!(
        pod.log().contains("has kept the system calls"),
        "{}",
        pod.log()
    );
    control.kill().await.unwrap();
}

#[tokio::test]
async fn the_calls_that_a_kernel_was_refused_are_in_the_report_of_its_end() {
    let Some(_) = uml_kernel() else { return };
    let (_, log) = probe(UmlMode::Seccomp, &["unsealed", "only=io_uring"]).await;
    let report = "the guest kernel exited with status 3 (the node refused it io_uring_setup)";
    assert!(log.contains(report), "{log}");
}

#[tokio::test]
async fn every_thread_of_a_guests_kernel_is_under_both_filters() {
    let Some(kernel) = uml_kernel() else { return };
    for (mode, vcpus) in [
        (UmlMode::Ptrace, 1),
        (UmlMode::Seccomp, 1),
        (UmlMode::Seccomp, 4),
    ] {
        let setup = Setup {
            mode,
            vcpus,
            script: "sleep 1000 & echo up; exec sleep 1000",
            ..Setup::default()
        };
        let mut pod = Pod::start(&kernel, setup).await;
        pod.expect("up").await;
        let (mut kernels, mut stubs);
        let deadline = Instant::now() + PATIENCE;
        loop {
            (kernels, stubs) = guests_filters(pod.process.pid());
            // A stub that has just been forked does not have its name yet.
            let are_all_there = kernels.len() <= vcpus as usize && stubs.len() >= 2;
            if are_all_there || Instant::now() > deadline {
                break;
            }
        }
        assert_eq!(kernels, vec![2; vcpus as usize], "{mode:?}");
        // And by their own, in this mode.
        let own = if mode == UmlMode::Seccomp { 3 } else { 2 };
        assert!(stubs.len() >= 2, "{stubs:?}");
        assert!(stubs.iter().all(|&count| count == own), "{stubs:?}");
    }
}

/// How many filters each thread of the guest's kernel, and each of its stubs, is
/// under.
fn guests_filters(vmm: u32) -> (Vec<u32>, Vec<u32>) {
    let (mut kernels, mut stubs) = (Vec::new(), Vec::new());
    for process in namespace_of(vmm) {
        if process.ends_with(vmm.to_string()) || is_file_server(&process) {
            continue;
        }
        // Some end meanwhile.
        for (name, count) in filters(&process).unwrap_or_default() {
            let stub = name == "uml-userspace";
            if stub { &mut stubs } else { &mut kernels }.push(count);
        }
    }
    (kernels, stubs)
}

/// The name of each thread, and how many filters it is under.
fn filters(process: &Path) -> io::Result<Vec<(String, u32)>> {
    let mut threads = Vec::new();
    for thread in fs::read_dir(process.join("task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap().trim().to_owned()
        };
        if field("State:").starts_with('Z') {
            continue;
        }
        assert_eq!(field("NoNewPrivs:"), "1");
        assert_eq!(field("Seccomp:"), "2");
        let count = field("Seccomp_filters:").parse().unwrap();
        threads.push((field("Name:"), count));
    }
    Ok(threads)
}

#[tokio::test]
async fn a_guests_kernel_is_in_a_user_namespace_that_takes_no_other() {
    let Some(kernel) = uml_kernel() else { return };
    let setup = Setup {
        script: "echo up; exec sleep 1000",
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    pod.expect("up").await;
    let vmm = PathBuf::from(format!("/proc/{}", pod.process.pid()));
    let user_ns = |process: &Path| fs::read_link(process.join("ns/user"));
    let ours = user_ns(Path::new("/proc/self")).unwrap();
    assert_eq!(user_ns(&vmm).unwrap(), ours);
    let processes = namespace_of(pod.process.pid());
    let guests: Vec<_> = processes
        .iter()
        .filter(|path| **path != vmm && !is_file_server(path))
        .collect();
    assert!(guests.len() >= 2, "{guests:?}");
    for process in &guests {
        // Some end meanwhile.
        let Ok(theirs) = user_ns(process) else {
            continue;
        };
        assert_ne!(theirs, ours, "{}", pod.log());
        for map in ["uid_map", "gid_map"] {
            let map = fs::read_to_string(process.join(map)).unwrap();
            let map: Vec<_> = map.split_whitespace().map(str::to_owned).collect();
            assert_eq!(map, [&UID.to_string(), &UID.to_string(), "1"]);
        }
    }
    // Whoever enters has all capabilities there, as no process of the guest has.
    let inside = File::open(guests[0].join("ns/user")).unwrap();
    let kinds = [
        CloneFlags::CLONE_NEWUSER,
        CloneFlags::CLONE_NEWNET,
        CloneFlags::CLONE_NEWNS,
        CloneFlags::CLONE_NEWPID,
        CloneFlags::CLONE_NEWIPC,
        CloneFlags::CLONE_NEWUTS,
        CloneFlags::CLONE_NEWCGROUP,
    ];
    for kind in kinds {
        let inside = inside.try_clone().unwrap();
        let mut command = Command::new("true");
        let make = move || {
            setns(&inside, CloneFlags::CLONE_NEWUSER)?;
            Ok(unshare(kind)?)
        };
        // SAFETY: it makes system calls and allocates nothing.
        unsafe { command.pre_exec(make) };
        let refused = command.status().unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC), "{kind:?}");
    }
}

/// All that a guest's program can call is its own kernel's to answer.
#[tokio::test]
async fn a_guest_has_the_same_answers_as_without_filters() {
    let Some(kernel) = uml_kernel() else { return };
    assert!(filter::is_supported());
    const SCRIPT: &str = "numbers";
    let dir = tempdir();
    let initramfs = dir.path().join("initramfs");
    make_initramfs(&initramfs, SCRIPT, &["numbers"]);
    for mode in MODES {
        let setup = Setup {
            mode,
            script: SCRIPT,
            tools: &["numbers"],
            ..Setup::default()
        };
        let mut pod = Pod::start(&kernel, setup).await;
        pod.expect("numbers 512").await;
        pod.ended().await;
        let inside = answers(&pod.console());
        let outside = answers(&alone(&kernel, mode, &initramfs, dir.path()));
        assert_eq!(inside.len(), 512, "{}", pod.console());
        let differ: Vec<_> = inside
            .iter()
            .filter(|line| !outside.contains(line))
            .collect();
        assert_eq!(inside, outside, "{mode:?}: {differ:?}");
    }
}

fn answers(console: &str) -> Vec<String> {
    let lines = console.lines().map(str::trim);
    let lines = lines.filter(|line| line.starts_with("nr "));
    lines.map(str::to_owned).collect()
}

/// The console of a guest that runs without a monitor, a jail and filters.
fn alone(kernel: &Path, mode: UmlMode, initramfs: &Path, dir: &Path) -> String {
    let console = dir.join(format!("alone-{mode:?}"));
    let mut guest = Command::new(kernel);
    guest
        .arg("mem=128M")
        .arg(format!("initrd={}", initramfs.display()))
        .arg(match mode {
            UmlMode::Seccomp => "seccomp=on",
            UmlMode::Ptrace => "seccomp=off",
        })
        .args([
            "con0=fd:0,fd:1",
            "con=null",
            "noreboot",
            "panic=-1",
            "quiet",
        ])
        .args(["rdinit=/init", "dummy.numdummies=0"])
        .env_clear()
        .env("TMPDIR", dir)
        .env("HOME", dir)
        .stdin(Stdio::null())
        .stdout(File::create(&console).unwrap());
    assert!(guest.status().unwrap().success());
    fs::read_to_string(console).unwrap()
}
