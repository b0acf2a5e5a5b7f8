//! What the guest does with its devices.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmm_client::protocol::{AGENT_PORT, EndCause, Event, VmState};
use vmm_client::{ControlError, DialError, LogToken, dial_vsock};

use crate::common::{
    HOST_ADDRESS, Pod, Setup, in_netns, ip, kernel, namespace_of, prepare, tempdir,
};

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
            echo empty=$(cat $s)
            while [ $(cat $s) = 0 ]; do usleep 10000; done
            echo size=$(cat $s) sum=$(md5sum < $d)
            dd if=/dev/zero of=$d bs=4k count=1 conv=fsync 2>/dev/null || echo write=refused
            while [ $(cat $s) != 0 ]; do usleep 10000; done
            echo detached
            while [ $(cat $s) = 0 ]; do usleep 10000; done
            echo again=$(cat $s)
            while [ $(cat $s) != 0 ]; do usleep 10000; done
        "#,
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    pod.expect("empty=0").await;
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

    // Whatever the guest is told of the slot, an image is read-only.
    pod.expect("write=refused").await;

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
async fn an_image_file_that_shrinks_is_an_error_to_the_guest_and_ends_it_by_name() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: r#"
            d=$(disk image0); turn image0
            dd if=$d of=/dev/null bs=4k count=1 2>/dev/null && echo first=ok
            turn image1
            dd if=$d of=/dev/null bs=4k skip=200 count=1 2>/dev/null || echo second=error
            sleep 60
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
    let go = File::open(pod.path("scratch")).unwrap();
    control.attach_disk(1, &[go.as_fd()]).await.unwrap();
    let reason = pod.ended().await;
    let why = "device image0: file 0 of the disk has shrunk from 1048576 to 4096 bytes";
    assert!(reason.starts_with(why), "{reason}");
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
            for v in /sys/bus/virtio/devices/*; do
                [ $(cat $v/device) = 0x0001 ] && echo features=$(cut -c1-16 $v/features)
            done
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
    // CSUM, GUEST_CSUM, MTU, MAC, GUEST_TSO4/6/UFO, HOST_TSO4/6/UFO, MRG_RXBUF.
    pod.expect("features=1101010110111011").await;
    pod.expect(", 0% packet loss").await;
    pod.expect(&sum).await;
    let between = tap_counters(&netns);
    pod.expect("sent").await;
    // More than an MTU a packet on the way down: segments are left whole. On
    // the way up that depends on the guest's pace, so its features must do.
    let mean = between.bytes / between.packets;
    assert!(mean > 1450.0, "{mean} bytes a packet");
    down.join().unwrap();
    let bytes = up.join().unwrap();
    assert_eq!(bytes.len(), BYTES);
    assert!(bytes.iter().all(|&b| b == b'y'));
}

#[tokio::test]
async fn a_tap_that_is_deleted_ends_the_machine_by_name() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        network: true,
        script: "echo running; sleep 60",
        ..Setup::default()
    };
    let dir = tempdir();
    let (request, cleanup) = prepare(&kernel, &setup, dir.path());
    let netns = cleanup.netns.clone().unwrap();
    let mut pod = Pod::run(dir, request, cleanup).await;
    pod.expect("running").await;
    in_netns(&netns, || ip(&["link", "del", "dev", "tap0"]))
        .join()
        .unwrap();
    let reason = pod.ended().await;
    assert!(
        reason.starts_with("device net: the tap tap0 has gone"),
        "{reason}"
    );
}

#[tokio::test]
async fn free_memory_goes_back_to_the_host() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: r#"
            for v in /sys/bus/virtio/devices/*; do
                [ $(cat $v/device) = 0x0005 ] && echo balloon=$(basename $(readlink $v/driver))
            done
            mkdir -p /t && mount -t tmpfs tmpfs /t
            yes drupe | head -c 50331648 > /t/big
            echo full
            turn image0
            rm /t/big
            sleep 5
            yes drupe | head -c 50331648 > /t/big && echo used=again
            sleep 60
        "#,
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    pod.expect("balloon=virtio_balloon").await;
    pod.expect("full").await;
    let full = pss_kib(&pod);
    assert!(full > 48 << 10, "{full} KiB\n{}", pod.console());
    // Any disk is a sign to go on.
    let go = File::open(pod.path("scratch")).unwrap();
    let mut control = pod.control().await;
    control.attach_disk(0, &[go.as_fd()]).await.unwrap();
    shrinks_to(&pod, full - (32 << 10)).await;
    // It is the memory that went, not the guest.
    pod.expect("used=again").await;
    control.kill().await.unwrap();
}

#[tokio::test]
async fn a_guest_starts_without_what_the_balloon_holds_and_gets_it_when_told() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        balloon_mib: 64,
        script: r#"
            free() { while read name kib _; do [ $name = MemFree: ] && echo $kib; done < /proc/meminfo; }
            wait_for() { until [ $(free) $1 $2 ]; do sleep 0.1; done; }
            wait_for -lt 57344; echo small
            wait_for -gt 81920; echo large
            wait_for -lt 57344; echo small=again
            mkdir -p /t && mount -t tmpfs -o size=100m tmpfs /t
            yes drupe | head -c 67108864 > /t/big && echo took=back
            sleep 60
        "#,
        ..Setup::default()
    };
    let mut pod = Pod::start(&kernel, setup).await;
    pod.expect("small").await;
    let mut control = pod.control().await;
    control.set_balloon(0).await.unwrap();
    pod.expect("large").await;
    control.set_balloon(64).await.unwrap();
    pod.expect("small=again").await;
    // A guest that runs out of memory takes pages back unasked.
    pod.expect("took=back").await;
    control.kill().await.unwrap();
}

/// Waits until a pod's memory is `kib` or less. Linux reports pages a few
/// seconds after they became free, and nothing tells that they went.
async fn shrinks_to(pod: &Pod, kib: u64) {
    const INTERVAL: Duration = Duration::from_millis(100);
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let now = pss_kib(pod);
        if now <= kib {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{now} KiB, not {kib}\n{}",
            pod.console()
        );
        tokio::time::sleep(INTERVAL).await;
    }
}

/// The memory of all processes of a pod.
fn pss_kib(pod: &Pod) -> u64 {
    let of = |path: &PathBuf| {
        let rollup = fs::read_to_string(path.join("smaps_rollup")).unwrap_or_default();
        let line = rollup.lines().find(|l| l.starts_with("Pss:"));
        line.map_or(0, |line| {
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        })
    };
    namespace_of(pod.process.pid()).iter().map(of).sum()
}

struct Counters {
    bytes: f64,
    packets: f64,
}

/// What the pod's tap has carried to the guest.
fn tap_counters(netns: &str) -> Counters {
    let output = Command::new("ip")
        .args(["-n", netns, "-s", "-s", "-j", "link", "show", "tap0"])
        .output()
        .unwrap();
    let links: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let count = |what: &str| links[0]["stats64"]["tx"][what].as_f64().unwrap();
    Counters {
        bytes: count("bytes"),
        packets: count("packets"),
    }
}

#[tokio::test]
async fn the_guest_reports_ready_and_its_ports_are_dialled() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        script: r#"
            vsock echo 1024 > /tmp/echo &
            until grep -q listening /tmp/echo; do usleep 1000; done
            vsock connect 1 </dev/null &
            vsock connect 77 </dev/null || echo refused
            turn image0
            vsock connect 1 </dev/null || echo ready-was-said
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

    // Nobody can take the agent's place.
    let mut control = pod.control().await;
    let signal = File::open(&kernel).unwrap();
    control.attach_disk(0, &[signal.as_fd()]).await.unwrap();
    pod.expect("ready-was-said").await;

    control.kill().await.unwrap();
    let Some(Event::State(status)) = events.next().await.unwrap() else {
        panic!("no end");
    };
    let VmState::Ended { reason, cause } = status.state else {
        panic!("{status:?}");
    };
    assert!(reason.starts_with("the machine was killed"), "{reason}");
    assert_eq!(cause, EndCause::Killed);
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
            token=000102030405060708090a0b0c0d0e0f
            turn image0; { echo c1 stdout $token; echo one; } | vsock connect 2
            { echo c1 stdout; echo forged; } | vsock connect 2
            { echo c1 stdout f$token; echo forged; } | vsock connect 2
            { echo c1 stdout ${token%f}0; echo forged; } | vsock connect 2; echo first
            turn image1; { echo c1 stderr $token; printf two; } | vsock connect 2; echo second
            until [ $(cat /sys/block/${t##*/}/size) = 0 ]; do usleep 10000; done
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
    assert!(control.status().await.unwrap().log_tokens);
    let token: [u8; 16] = std::array::from_fn(|n| n as u8);
    let token = Some(LogToken::new(token));
    control.open_log("c1", token, old.as_fd()).await.unwrap();
    control.attach_disk(0, &[signal.as_fd()]).await.unwrap();
    pod.expect("first").await;
    control.open_log("c1", None, new.as_fd()).await.unwrap();
    control.attach_disk(1, &[signal.as_fd()]).await.unwrap();
    pod.expect("second").await;
    control.close_log("c1").await.unwrap();
    let refused = control
        .open_log("../evil", None, new.as_fd())
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("not a container id"),
        "{refused}"
    );
    control.detach_disk(1).await.unwrap();
    pod.ended().await;
    let read = |name: &str| fs::read_to_string(pod.path(name)).unwrap();
    assert_eq!(read("c1.log").lines().count(), 1, "{}", read("c1.log"));
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

fn md5(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    fs::write(&path, bytes).unwrap();
    let output = Command::new("md5sum").arg(&path).output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}
