//! Measurements: run with `--release -- --ignored --nocapture measure`.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::thread;

use vmm_client::UmlMode;
use vmm_client::protocol::{Event, VmState};

use crate::common::{HOST_ADDRESS, Pod, Setup, in_netns, kernel, namespace_of, prepare, tempdir};

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
                script: "vsock connect 1 </dev/null & sleep 1000",
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
            let all: u64 = namespace_of(vmm).iter().map(|path| of(path)).sum();
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

#[tokio::test]
#[ignore = "a measurement, not a check"]
async fn how_fast_disks_and_the_network_are() {
    let Some(kernel) = kernel() else { return };
    let setup = Setup {
        network: true,
        script: r#"
            ip link set eth0 up && ip addr add 10.231.7.2/24 dev eth0
            timed() { a=$(cut -d' ' -f1 /proc/uptime); sh -c "$2" >/dev/null 2>&1
                b=$(cut -d' ' -f1 /proc/uptime); echo "$1: $a to $b s"; }
            export d=$(disk scratch)
            timed '60 MiB to the disk' 'dd if=/dev/zero of=$d bs=1M count=60 conv=fsync'
            echo 3 > /proc/sys/vm/drop_caches
            timed '60 MiB from the disk' 'dd if=$d of=/dev/null bs=1M count=60'
            timed '256 MiB from the network' 'nc 10.231.7.1 5001 </dev/null'
            timed '256 MiB to the network' 'dd if=/dev/zero bs=64k count=4096 | nc 10.231.7.1 5002'
            ping -c 200 -i 0.002 10.231.7.1 | tail -1
        "#,
        ..Setup::default()
    };
    let dir = tempdir();
    let (request, cleanup) = prepare(&kernel, &setup, dir.path());
    let netns = cleanup.netns.clone().unwrap();
    let bind = |port| {
        let bind = move || TcpListener::bind((HOST_ADDRESS, port)).unwrap();
        in_netns(&netns, bind).join().unwrap()
    };
    let (source, sink) = (bind(5001), bind(5002));
    thread::spawn(move || {
        let (mut stream, _) = source.accept().unwrap();
        for _ in 0..4096 {
            stream.write_all(&[0; 65536]).unwrap();
        }
    });
    thread::spawn(move || std::io::copy(&mut sink.accept().unwrap().0, &mut std::io::sink()));
    let mut pod = Pod::run(dir, request, cleanup).await;
    println!("{}", pod.ended().await);
}
