//! A real guest in the jail, seen from its console and from the daemon's side.

// Not all of a test's code is in functions that clippy takes for tests.
#![allow(clippy::unwrap_used)]

mod common;

/// Tells the process that plays the daemon where to put its pod.
const DAEMON_DIR: &str = "DRUPE_TEST_DAEMON_DIR";

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::{HOST_ADDRESS, Pod, Setup, UID, in_netns, kernel, namespace_of, prepare, tempdir};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmm_client::protocol::{AGENT_PORT, Event, VmState};
use vmm_client::{Control, ControlError, DialError, UmlMode, dial_vsock};

#[tokio::test]
async fn a_guest_boots_in_each_mode_and_powers_off() {
    let Some(kernel) = kernel() else { return };
    for (mode, vcpus) in [
        (UmlMode::Ptrace, 1),
        (UmlMode::Seccomp, 1),
        (UmlMode::Seccomp, 2),
    ] {
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
async fn the_scratch_disk_keeps_what_the_guest_writes() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: r#"
            d=$(disk scratch)
            yes drupe | dd of=$d bs=64k count=160 iflag=fullblock seek=8 2>/dev/null
            sync
            echo 3 > /proc/sys/vm/drop_caches
            echo sum=$(dd if=$d bs=64k skip=8 count=160 2>/dev/null | md5sum)
            fstrim -V >/dev/null 2>&1
            blkdiscard -o 1048576 -l 4194304 $d && echo discarded
        "#,
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    let reason = pod.ended().await;
    let disk = fs::read(pod.path("scratch")).unwrap();
    let written = &disk[512 << 10..][..10 << 20];
    let expected: Vec<u8> = b"drupe\n".iter().copied().cycle().take(10 << 20).collect();
    // The first 4.5 MiB of it may have been discarded again.
    assert_eq!(written[5 << 20..], expected[5 << 20..]);
    assert!(reason.contains(&md5(&expected)), "{reason}");
}

#[tokio::test]
async fn images_come_and_go_while_the_guest_runs() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: r#"
            d=$(disk image1); s=/sys/block/${d##*/}/size
            echo empty=$(cat $s) ro=$(cat /sys/block/${d##*/}/ro)
            while [ $(cat $s) = 0 ]; do usleep 10000; done
            echo size=$(cat $s) sum=$(md5sum < $d)
            while [ $(cat $s) != 0 ]; do usleep 10000; done
            echo detached
            while [ $(cat $s) = 0 ]; do usleep 10000; done
            echo again=$(cat $s)
            while [ $(cat $s) != 0 ]; do usleep 10000; done
        "#,
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    pod.expect("empty=0 ro=1").await;
    let mut control = pod.control().await;

    // Two layers, neither a multiple of 4096 long.
    let mut disk = Vec::new();
    let mut files = Vec::new();
    for (number, len) in [(1u8, 100_000usize), (2, 5_000_001)] {
        let bytes: Vec<u8> = (0..len).map(|i| (i / 7) as u8 ^ number).collect();
        let path = pod.path(&format!("layer{number}"));
        fs::write(&path, &bytes).unwrap();
        files.push(File::open(path).unwrap());
        disk.extend(&bytes);
        disk.resize(disk.len().next_multiple_of(4096), 0);
    }
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    control.attach_disk(1, &fds).await.unwrap();
    pod.expect(&format!("size={} sum={}", disk.len() / 512, md5(&disk)))
        .await;

    let refused = control.attach_disk(1, &fds).await.unwrap_err();
    assert!(
        refused.to_string().contains("has a disk already"),
        "{refused}"
    );
    let refused = control.attach_disk(9, &fds).await.unwrap_err();
    assert!(refused.to_string().contains("no disk slot 9"), "{refused}");
    let refused = control.attach_disk(0, &[]).await.unwrap_err();
    assert!(refused.to_string().contains("no file"), "{refused}");

    control.detach_disk(1).await.unwrap();
    pod.expect("detached").await;
    control.attach_disk(1, &fds[..1]).await.unwrap();
    pod.expect("again=200").await;
    control.detach_disk(1).await.unwrap();
    pod.ended().await;
}

#[tokio::test]
async fn an_image_file_that_shrinks_gives_the_guest_an_error() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: r#"
            d=$(disk image0); s=/sys/block/${d##*/}/size
            while [ $(cat $s) = 0 ]; do usleep 10000; done
            dd if=$d of=/dev/null bs=4k count=1 2>/dev/null && echo first=ok
            while ! [ -e /tmp/go ]; do vsock connect 1 </dev/null; touch /tmp/go; done
            usleep 300000
            dd if=$d of=/dev/null bs=4k skip=200 count=1 2>/dev/null || echo second=error
        "#,
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    let path = pod.path("layer");
    fs::write(&path, vec![1; 1 << 20]).unwrap();
    let file = File::open(&path).unwrap();
    let mut control = pod.control().await;
    control.attach_disk(0, &[file.as_fd()]).await.unwrap();
    pod.expect("first=ok").await;
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let reason = pod.ended().await;
    assert!(reason.contains("second=error"), "{reason}");
}

#[tokio::test]
async fn the_network_carries_packets_of_all_sizes_both_ways() {
    let Some(kernel) = kernel() else { return };
    const BYTES: usize = 32 << 20;
    let setup = Setup {
        network: true,
        script: r#"
            ip link set eth0 up && ip addr add 10.231.7.2/24 dev eth0
            echo mac=$(cat /sys/class/net/eth0/address) mtu=$(cat /sys/class/net/eth0/mtu)
            ping -c 3 -i 0.1 -s 1300 10.231.7.1 | grep -o ', 0% packet loss'
            nc 10.231.7.1 5001 </dev/null | md5sum
            dd if=/dev/zero bs=64k count=512 2>/dev/null | tr '\0' y | nc 10.231.7.1 5002
            echo sent
        "#,
        ..Setup::default()
    };
    let dir = tempdir();
    let (request, cleanup) = prepare(&kernel, &setup, dir.path());
    let netns = cleanup.netns.clone().unwrap();
    let bind = |port| {
        in_netns(&netns, move || {
            TcpListener::bind((HOST_ADDRESS, port)).unwrap()
        })
        .join()
        .unwrap()
    };
    let (source, sink) = (bind(5001), bind(5002));
    let payload: Vec<u8> = (0..BYTES).map(|i| (i / 13 % 251) as u8).collect();
    let sum = md5(&payload);
    let down = thread::spawn(move || source.accept().unwrap().0.write_all(&payload).unwrap());
    let up = thread::spawn(move || {
        let mut bytes = Vec::new();
        sink.accept().unwrap().0.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let mut pod = Pod::run(dir, request, cleanup).await;
    pod.expect("mac=02:d7:00:00:00:01 mtu=1400").await;
    pod.expect(", 0% packet loss").await;
    pod.expect(&sum).await;
    pod.expect("sent").await;
    down.join().unwrap();
    let bytes = up.join().unwrap();
    assert_eq!(bytes.len(), BYTES);
    assert!(bytes.iter().all(|&b| b == b'y'));
}

#[tokio::test]
async fn the_guest_reports_ready_and_its_ports_are_dialled() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: r#"
            vsock echo 1024 > /tmp/echo &
            until grep -q listening /tmp/echo; do usleep 1000; done
            vsock connect 1 </dev/null
            vsock connect 77 </dev/null || echo refused
            sleep 1000
        "#,
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    let mut events = pod.control().await.subscribe().await.unwrap();
    let status = loop {
        let event = tokio::time::timeout(Duration::from_secs(30), events.next());
        let Some(Event::State(status)) = event.await.unwrap().unwrap() else {
            panic!("ended: {}", pod.console());
        };
        if status.state == VmState::Ready {
            break status;
        }
    };
    assert!(status.jailed_us < status.machine_started_us);
    assert!(status.machine_started_us < status.guest_ready_us);

    let path = pod.path("vsock");
    let mut stream = dial_vsock(&path, AGENT_PORT).await.unwrap();
    let sent: Vec<u8> = (0..3_000_000).map(|i| (i / 3) as u8).collect();
    let (mut reader, mut writer) = stream.split();
    let mut echoed = Vec::new();
    let write = async {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let (_, read) = tokio::join!(write, reader.read_to_end(&mut echoed));
    read.unwrap();
    assert!(echoed == sent, "{} bytes came back", echoed.len());

    let error = dial_vsock(&path, 1025).await.unwrap_err();
    assert!(matches!(error, DialError::Refused { port: 1025, .. }));
    pod.expect("refused").await;

    let mut control = pod.control().await;
    control.kill().await.unwrap();
    let Some(Event::State(status)) = events.next().await.unwrap() else {
        panic!("no end");
    };
    let VmState::Ended { reason } = status.state else {
        panic!("{status:?}");
    };
    assert!(reason.starts_with("the machine was killed"), "{reason}");
    assert!(events.next().await.unwrap().is_none());
    assert!(pod.process.wait().await.unwrap().success());
    assert!(matches!(
        control.status().await,
        Err(ControlError::Gone { .. } | ControlError::Connect { .. })
    ));
}

#[tokio::test]
async fn a_volume_mounted_while_the_guest_runs_is_seen_in_it() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: r#"
            mount -t virtiofs shared /mnt && echo mounted
            until cat /mnt/volume/file 2>/dev/null; do usleep 10000; done
            echo from-the-guest > /mnt/volume/answer && chown 1234:5678 /mnt/volume/answer
            echo answered
        "#,
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    pod.expect("mounted").await;
    let (source, target) = (pod.path("source"), pod.path("shared/volume"));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&target).unwrap();
    fs::write(source.join("file"), "hello from a volume\n").unwrap();
    let none = None::<&str>;
    mount(Some(&source), &target, none, MsFlags::MS_BIND, none).unwrap();
    pod.expect("hello from a volume").await;
    pod.expect("answered").await;
    let answer = source.join("answer");
    assert_eq!(fs::read_to_string(&answer).unwrap(), "from-the-guest\n");
    let meta = fs::metadata(&answer).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (1234, 5678));
    pod.ended().await;
}

#[tokio::test]
async fn container_output_reaches_its_log_and_survives_rotation() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: r#"
            turn() { d=$(disk $1); while [ $(cat /sys/block/${d##*/}/size) = 0 ]; do
                usleep 10000; done; }
            turn image0; { echo c1 stdout; echo one; } | vsock connect 2; echo first
            turn image1; { echo c1 stderr; printf two; } | vsock connect 2; echo second
        "#,
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    let mut control = pod.control().await;
    let open = |name: &str| {
        let mut options = File::options();
        options
            .append(true)
            .create(true)
            .open(pod.path(name))
            .unwrap()
    };
    let (old, new) = (open("c1.log"), open("c1.log.1"));
    let signal = File::open(&kernel).unwrap();
    control.open_log("c1", old.as_fd()).await.unwrap();
    control.attach_disk(0, &[signal.as_fd()]).await.unwrap();
    pod.expect("first").await;
    control.open_log("c1", new.as_fd()).await.unwrap();
    control.attach_disk(1, &[signal.as_fd()]).await.unwrap();
    pod.expect("second").await;
    control.close_log("c1").await.unwrap();
    let refused = control.open_log("../evil", new.as_fd()).await.unwrap_err();
    assert!(
        refused.to_string().contains("not a container id"),
        "{refused}"
    );
    pod.ended().await;
    let read = |name: &str| fs::read_to_string(pod.path(name)).unwrap();
    assert!(
        read("c1.log").ends_with(" stdout F one\n"),
        "{}",
        read("c1.log")
    );
    assert!(
        read("c1.log.1").ends_with(" stderr P two\n")
            || read("c1.log.1").ends_with(" stderr F two\n"),
        "{}",
        read("c1.log.1")
    );
}

#[tokio::test]
async fn nothing_in_the_jail_has_more_rights_than_it_needs() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: "echo up; sleep 1000",
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    pod.expect("up").await;
    let vmm = pod.process.pid();
    let processes = namespace_of(vmm);
    assert!(processes.len() > 1);
    for process in &processes {
        let status = fs::read_to_string(process.join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(field("Uid:"), UID.to_string());
        assert_eq!(field("Gid:"), UID.to_string());
        assert_eq!(field("NoNewPrivs:"), "1");
        let is_vmm = process.ends_with(vmm.to_string());
        // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD,
        // SETFCAP; see capability.h.
        let allowed = if is_vmm { 0x8800_00db } else { 0u64 };
        let effective = u64::from_str_radix(&field("CapEff:"), 16).unwrap();
        let permitted = u64::from_str_radix(&field("CapPrm:"), 16).unwrap();
        assert_eq!((effective, permitted), (allowed, allowed), "{status}");
        let entries = |path: &str| {
            let mut names: Vec<_> = fs::read_dir(process.join("root").join(path))
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(entries(""), ["dev", "proc", "run", "shared", "tmp"]);
        assert_eq!(entries("dev"), ["null", "urandom", "zero"]);
        let links = fs::read_to_string(process.join("net/dev")).unwrap();
        assert_eq!(links.lines().count(), 3, "only loopback: {links}");
    }
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
    assert!(processes.len() > 1);
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
        .args(["--ignored", "--exact", "a_daemon_that_starts_a_pod"])
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
    while Path::new("/proc").join(&vmm).exists() && !is_zombie(&vmm) {
        assert!(std::time::Instant::now() < deadline, "the VMM is left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    umount2(&dir.path().join("shared"), MntFlags::MNT_DETACH).unwrap();
}

/// An orphan waits for whoever is init here.
fn is_zombie(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
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
            .contains("guest kernel cannot be executed"),
        "{error}"
    );
    drop(cleanup);
}

/// Run with `--ignored --nocapture --release` for numbers worth noting.
#[tokio::test]
#[ignore = "a measurement, not a check"]
async fn how_long_a_boot_takes_and_what_it_costs() {
    let Some(kernel) = kernel() else { return };
    for (mode, image_slots) in [
        (UmlMode::Ptrace, 16),
        (UmlMode::Seccomp, 16),
        (UmlMode::Seccomp, 0),
    ] {
        let mut ready = Vec::new();
        let mut pss = (0, 0);
        for _ in 0..7 {
            let setup = Setup {
                mode,
                image_slots,
                network: true,
                script: "vsock connect 1 </dev/null; sleep 1000",
                ..Setup::default()
            };
            let before = std::time::Instant::now();
            let pod = Pod::start(&kernel, setup).await;
            let spawned = before.elapsed().as_micros();
            let mut events = pod.control().await.subscribe().await.unwrap();
            let status = loop {
                let Some(Event::State(status)) = events.next().await.unwrap() else {
                    panic!("{}", pod.console());
                };
                if status.state == VmState::Ready {
                    break status;
                }
            };
            ready.push((
                status.guest_ready_us.unwrap(),
                status.jailed_us.unwrap(),
                status.machine_started_us.unwrap(),
                spawned,
            ));
            let vmm = pod.process.pid();
            let of = |path: &std::path::Path| -> u64 {
                let rollup = fs::read_to_string(path.join("smaps_rollup")).unwrap_or_default();
                let line = rollup
                    .lines()
                    .find(|l| l.starts_with("Pss:"))
                    .unwrap_or("Pss: 0");
                line.split_whitespace().nth(1).unwrap().parse().unwrap()
            };
            let all: u64 = namespace_of(vmm).iter().map(|p| of(p)).sum();
            pss = (of(format!("/proc/{vmm}").as_ref()), all);
            pod.control().await.kill().await.unwrap();
        }
        ready.sort_unstable();
        println!(
            "{mode:?}, {image_slots} slots: (ready, jailed, machine started, spawn) µs median {:?} of {ready:?}; \
             PSS of the VMM {} KiB, of all {} KiB",
            ready[ready.len() / 2],
            pss.0,
            pss.1
        );
    }
}

fn md5(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    fs::write(&path, bytes).unwrap();
    let output = Command::new("md5sum").arg(&path).output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}
