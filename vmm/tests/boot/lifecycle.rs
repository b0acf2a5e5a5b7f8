//! Start, confinement and end.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use vmm_client::protocol::{EndCause, Event, VmState};
use vmm_client::{Control, UmlMode};

use crate::common::{
    PATIENCE, Pod, Setup, UID, is_file_server, is_kvm, kernel, namespace_of, prepare, tempdir,
};

/// Tells the process that plays the daemon where to put its pod.
const DAEMON_DIR: &str = "DRUPE_TEST_DAEMON_DIR";

#[tokio::test]
async fn a_guest_boots_in_each_mode_and_powers_off() {
    let Some(kernel) = kernel() else { return };
    for (mode, vcpus) in [
        (UmlMode::Ptrace, 1),
        (UmlMode::Seccomp, 1),
        (UmlMode::Seccomp, 2),
        (UmlMode::Seccomp, 4),
    ] {
        // The second mode has the same on kvm, with one processor and two.
        if is_kvm() && mode == UmlMode::Ptrace {
            continue;
        }
        let setup = Setup {
            mode,
            vcpus,
            script: "echo cpus=$(nproc)",
            ..Setup::default()
        };
        let mut pod = Pod::start(&kernel, setup).await;
        let reason = pod.ended().await;
        assert!(reason.starts_with("the guest powered off"), "{reason}");
        assert!(reason.contains(&format!("cpus={vcpus}")), "{reason}");
    }
}

#[tokio::test]
async fn a_guest_that_switches_itself_off_ends_its_machine() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: "poweroff -f",
        ..Setup::default()
    };
    let (reason, cause) = Pod::start(&kernel, setup).await.ended_by().await;
    assert!(reason.starts_with("the guest powered off"), "{reason}");
    assert_eq!(cause, EndCause::PoweredOff);
}

#[tokio::test]
async fn a_guest_that_panics_is_reported_with_its_last_words() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: "echo famous last words; exit 7",
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    let (reason, cause) = pod.ended_by().await;
    assert!(
        reason.contains("kernel panic: Attempted to kill init!"),
        "{reason}"
    );
    assert_eq!(cause, EndCause::GuestPanic);
    assert!(reason.contains("famous last words"), "{reason}");
}

#[tokio::test]
async fn nothing_in_the_jail_has_more_rights_than_it_needs() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: "echo up; exec sleep 1000",
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    pod.expect("up").await;
    let vmm = pod.process.pid();
    let processes = namespace_of(vmm);
    assert!(processes.len() > 1 || is_kvm());
    for process in &processes {
        let is_vmm = process.ends_with(vmm.to_string());
        match check_rights(process) {
            // One of the guest's processes that ended meanwhile.
            Err(_) if !is_vmm && has_ended(process) => {}
            other => other.unwrap(),
        }
    }
    let servers = processes.iter().filter(|p| is_file_server(p)).count();
    assert_eq!(servers, 1);
}

fn check_rights(process: &Path) -> io::Result<()> {
    let status = fs::read_to_string(process.join("status"))?;
    let entries = |path: &str| -> io::Result<Vec<_>> {
        let mut names = fs::read_dir(process.join("root").join(path))?
            .map(|entry| Ok(entry?.file_name().into_string().unwrap()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    let links = fs::read_to_string(process.join("net/dev"))?;

    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    let number = |name: &str| u64::from_str_radix(&field(name), 16).unwrap();
    assert_eq!(field("Uid:"), UID.to_string());
    assert_eq!(field("Gid:"), UID.to_string());
    assert_eq!(field("NoNewPrivs:"), "1");
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP; see
    // capability.h.
    let allowed = if is_file_server(process) {
        0x8000_00db
    } else {
        0
    };
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(number(set), allowed, "{set} {status}");
    }
    assert_eq!((number("CapInh:"), number("CapAmb:")), (0, 0), "{status}");
    for thread in fs::read_dir(process.join("task"))? {
        // Some end meanwhile.
        let status = fs::read_to_string(thread?.path().join("status")).unwrap_or_default();
        let filtered = status.contains("\nSeccomp:\t2\n");
        assert!(filtered || status.is_empty(), "{status}");
    }
    let root = entries("")?;
    if is_file_server(process) {
        assert!(root.is_empty(), "{root:?}");
    } else {
        assert_eq!(root, ["dev", "pids", "proc", "run", "tmp"]);
        assert_eq!(entries("dev")?, ["null", "urandom", "zero"]);
        assert_eq!(entries("proc")?, ["cpuinfo", "self"]);
    }
    for kind in ["mnt", "net", "ipc", "uts", "cgroup", "pid"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(kind));
        assert_ne!(of(process)?, of(Path::new("/proc/self"))?, "{kind}");
    }
    assert_eq!(links.lines().count(), 3, "only loopback: {links}");
    Ok(())
}

#[tokio::test]
async fn when_the_vmm_is_killed_its_guest_goes_with_it() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: "echo up; sleep 1000",
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    pod.expect("up").await;
    let processes = namespace_of(pod.process.pid());
    assert!(processes.len() > 1 || is_kvm());
    kill(Pid::from_raw(pod.process.pid() as i32), Signal::SIGKILL).unwrap();
    // PID 1 is reaped only after all others of its namespace.
    pod.process.wait().await.unwrap();
    for process in processes {
        assert!(!process.exists(), "{} is left", process.display());
    }
}

#[tokio::test]
async fn a_start_that_is_given_up_leaves_no_process() {
    let Some(kernel) = kernel() else { return };
    for millis in [0, 1, 2, 5, 10, 20] {
        let dir = tempdir();
        let (mut request, cleanup) = prepare(&kernel, &Setup::default(), dir.path());
        let jail = dir.path().join("jail");
        // The VMM alone holds its log, for as long as one of its processes is
        // left.
        let (log, end) = io::pipe().unwrap();
        request.log = OwnedFd::from(end).into();
        let _ = tokio::time::timeout(Duration::from_millis(millis), vmm_client::spawn(request))
            .await
            .map(|spawned| spawned.unwrap().kill());
        let mut log = pipe::Receiver::from_owned_fd(log.into()).unwrap();
        let mut text = Vec::new();
        tokio::time::timeout(Duration::from_secs(10), log.read_to_end(&mut text))
            .await
            .unwrap_or_else(|_| panic!("left after {millis} ms"))
            .unwrap();
        assert_eq!(fs::read_dir(jail).unwrap().count(), 0);
        drop(cleanup);
    }
}

#[tokio::test]
async fn when_the_daemon_is_killed_the_pod_goes_on() {
    let Some(kernel) = kernel() else { return };
    // The daemon is this test once more, as a process of its own.
    if let Some(dir) = std::env::var_os(DAEMON_DIR) {
        return be_a_daemon(&kernel, Path::new(&dir)).await;
    }
    let dir = tempdir();
    let (words, its_end) = UnixStream::pair().unwrap();
    words.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "lifecycle::when_the_daemon_is_killed_the_pod_goes_on",
        ])
        .env(DAEMON_DIR, dir.path())
        .stdin(OwnedFd::from(its_end))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut pid = String::new();
    let read = BufReader::new(words).read_line(&mut pid);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    read.unwrap();
    let pid = pid.trim().parse().expect("the daemon tells its pod's PID");
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let vmm = pidfd_open(pid, PidfdFlags::empty()).unwrap();

    let mut control = Control::connect(&dir.path().join("control")).await.unwrap();
    assert_eq!(control.status().await.unwrap().state, VmState::Booting);
    let layer = dir.path().join("scratch");
    control
        .attach_disk(0, &[File::open(layer).unwrap().as_fd()])
        .await
        .unwrap();
    let mut events = control.subscribe().await.unwrap();
    let killer = Control::connect(&dir.path().join("control")).await;
    killer.unwrap().kill().await.unwrap();
    let mut last = None;
    while let Some(Event::State(status)) = events.next().await.unwrap() {
        last = Some(status.state);
    }
    assert!(matches!(last, Some(VmState::Ended { .. })), "{last:?}");
    let mut ended = [PollFd::new(vmm.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut ended, patience).unwrap(), 1, "the VMM is left");
    umount2(&dir.path().join("shared"), MntFlags::MNT_DETACH).unwrap();
}

/// Starts a pod in `dir`, tells its PID and stays.
async fn be_a_daemon(kernel: &Path, dir: &Path) {
    let setup = Setup {
        script: "echo up; until [ $(cat /sys/block/vda/size) != 0 ]; do sleep 1; done; sleep 1000",
        ..Setup::default()
    };
    let (request, cleanup) = prepare(kernel, &setup, dir);
    std::mem::forget(cleanup);
    let process = vmm_client::spawn(request).await.unwrap();
    let mut test = File::from(io::stdin().as_fd().try_clone_to_owned().unwrap());
    writeln!(test, "{}", process.pid()).unwrap();
    std::future::pending::<()>().await;
}

/// Gone, or waiting to be reaped: an orphan's is whoever is init here.
fn has_ended(process: &Path) -> bool {
    fs::read_to_string(process.join("stat")).is_ok_and(|stat| stat.contains(") Z "))
        || !process.exists()
}

#[tokio::test]
async fn a_kernel_that_cannot_run_is_named_in_the_error() {
    let Some(_) = kernel() else { return };
    let dir = tempdir();
    let bogus = dir.path().join("kernel");
    fs::write(&bogus, "no kernel").unwrap();
    let (request, cleanup) = prepare(&bogus, &Setup::default(), dir.path());
    let error = vmm_client::spawn(request).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("guest kernel cannot be executed")
            || is_kvm() && error.to_string().contains("guest kernel is neither an ELF"),
        "{error}"
    );
    drop(cleanup);
}
