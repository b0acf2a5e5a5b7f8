//! Start, confinement and end.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmm_client::protocol::{Event, VmState};
use vmm_client::{Control, UmlMode};

use crate::common::{Pod, Setup, UID, is_kvm, kernel, namespace_of, prepare, tempdir};

/// Tells the process that plays the daemon where to put its pod.
const DAEMON_DIR: &str = "DRUPE_TEST_DAEMON_DIR";

#[tokio::test]
async fn a_guest_boots_in_each_mode_and_powers_off() {
    let Some(kernel) = kernel() else { return };
    for (mode, vcpus) in [
        (UmlMode::Ptrace, 1),
        (UmlMode::Seccomp, 1),
        (UmlMode::Seccomp, 2),
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
    let reason = Pod::start(&kernel, setup).await.ended().await;
    assert!(reason.starts_with("the guest powered off"), "{reason}");
}

#[tokio::test]
async fn a_guest_that_panics_is_reported_with_its_last_words() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: "echo famous last words; exit 7",
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    let reason = pod.ended().await;
    assert!(
        reason.contains("kernel panic: Attempted to kill init!"),
        "{reason}"
    );
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
        match check_rights(process, is_vmm) {
            // One of the guest's processes that ended meanwhile.
            Err(_) if !is_vmm && has_ended(process) => {}
            other => other.unwrap(),
        }
    }
}

fn check_rights(process: &Path, is_vmm: bool) -> io::Result<()> {
    let status = fs::read_to_string(process.join("status"))?;
    let entries = |path: &str| -> io::Result<Vec<_>> {
        let mut names = fs::read_dir(process.join("root").join(path))?
            .map(|entry| Ok(entry?.file_name().into_string().unwrap()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    let (root, dev) = (entries("")?, entries("dev")?);
    let links = fs::read_to_string(process.join("net/dev"))?;

    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(field("Uid:"), UID.to_string());
    assert_eq!(field("Gid:"), UID.to_string());
    assert_eq!(field("NoNewPrivs:"), "1");
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP; see
    // capability.h.
    let allowed = if is_vmm { 0x8800_00db } else { 0u64 };
    let effective = u64::from_str_radix(&field("CapEff:"), 16).unwrap();
    let permitted = u64::from_str_radix(&field("CapPrm:"), 16).unwrap();
    assert_eq!((effective, permitted), (allowed, allowed), "{status}");
    assert_eq!(root, ["dev", "proc", "run", "shared", "tmp"]);
    assert_eq!(dev, ["null", "urandom", "zero"]);
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
        let (request, cleanup) = prepare(&kernel, &Setup::default(), dir.path());
        let jail = dir.path().join("jail");
        let _ = tokio::time::timeout(Duration::from_millis(millis), vmm_client::spawn(request))
            .await
            .map(|spawned| spawned.unwrap().kill());
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        // The log is held by the VMM alone: it is gone when nobody has it open.
        while held_by_anyone(&dir.path().join("vmm.log")) {
            assert!(
                std::time::Instant::now() < deadline,
                "left after {millis} ms"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(fs::read_dir(jail).unwrap().count(), 0);
        drop(cleanup);
    }
}

fn held_by_anyone(path: &Path) -> bool {
    let fds = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| fs::read_dir(entry.unwrap().path().join("fd")).ok());
    fds.flatten()
        .filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
        .any(|target| target == path)
}

/// The other half of the next test, which runs this one as a process.
#[tokio::test]
#[ignore = "runs as a part of another test"]
async fn a_daemon_that_starts_a_pod() {
    let (Some(kernel), Some(dir)) = (kernel(), std::env::var_os(DAEMON_DIR)) else {
        return;
    };
    let setup = Setup {
        script: "echo up; until [ $(cat /sys/block/vda/size) != 0 ]; do sleep 1; done; sleep 1000",
        ..Setup::default()
    };
    let dir = PathBuf::from(dir);
    let (request, cleanup) = prepare(&kernel, &setup, &dir);
    std::mem::forget(cleanup);
    let process = vmm_client::spawn(request).await.unwrap();
    fs::write(dir.join("pid.new"), process.pid().to_string()).unwrap();
    fs::rename(dir.join("pid.new"), dir.join("pid")).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn when_the_daemon_is_killed_the_pod_goes_on() {
    let Some(_) = kernel() else { return };
    let dir = tempdir();
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "lifecycle::a_daemon_that_starts_a_pod",
        ])
        .env(DAEMON_DIR, dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let pid_file = dir.path().join("pid");
    while !pid_file.exists() {
        assert!(daemon.try_wait().unwrap().is_none(), "the daemon failed");
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let vmm = fs::read_to_string(pid_file).unwrap();

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
    while !has_ended(&Path::new("/proc").join(&vmm)) {
        assert!(std::time::Instant::now() < deadline, "the VMM is left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    umount2(&dir.path().join("shared"), MntFlags::MNT_DETACH).unwrap();
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
