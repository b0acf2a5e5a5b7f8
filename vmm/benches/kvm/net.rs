//! TCP from and to a guest through its tap, and between two guests.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::figures::{Aim, Samples, heading, ratio};
use crate::host::{Ready, run, tempdir};
use crate::vm::{Monitor, Running, Tap, Vm};
use crate::{Files, ROUNDS, initramfs};

const NETNS: &str = "bench-kvm";
const HOST: &str = "10.231.7.1";
const TAPS: [&str; 2] = ["tap0", "tap1"];
const MONITORS: [Monitor; 3] = [
    Monitor::Drupe,
    Monitor::Qemu { vhost_net: false },
    Monitor::Qemu { vhost_net: true },
];

#[derive(Default)]
struct Side {
    to_host: Samples,
    from_host: Samples,
    between: Samples,
}

/// A network of two taps on a bridge that the host is on as well.
struct Network(Child);

impl Network {
    fn new() -> Result<Self> {
        run(&["ip", "netns", "add", NETNS])?;
        let ip = |words: &str| {
            let words: Vec<&str> = ["ip", "-n", NETNS]
                .into_iter()
                .chain(words.split(' '))
                .collect();
            run(&words)
        };
        ip("link add br0 type bridge")?;
        ip(&format!("addr add {HOST}/24 dev br0"))?;
        ip("link set br0 up")?;
        for tap in TAPS {
            ip(&format!("tuntap add dev {tap} mode tap vnet_hdr"))?;
            ip(&format!("link set {tap} master br0 up"))?;
        }
        let server = Command::new("ip")
            .args(["netns", "exec", NETNS, "iperf3", "-s"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("iperf3")?;
        Ok(Self(server))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The node that this runs in ends with it, whatever is left.
        let _ = self.0.kill();
        let _ = self.0.wait();
        if let Err(error) = run(&["ip", "netns", "del", NETNS]) {
            eprintln!("{error:#}");
        }
    }
}

/// The guest with the tap of this number, and a script for its init.
fn script(number: usize, then: &str) -> String {
    format!(
        "rate() {{ echo \"$1 $(iperf3 -f k -t 2 $2 | awk '/receiver/ {{ print $7 }}')\"; }}\n\
         ip link set lo up\n\
         ip link set eth0 up\n\
         ip addr add 10.231.7.{}/24 dev eth0\n\
         {then}",
        number + 2
    )
}

fn tap(number: usize) -> Tap<'static> {
    Tap {
        netns: NETNS,
        name: TAPS[number],
        mac: [0x02, 0xd7, 0, 0, 0, number as u8],
    }
}

pub async fn measure(files: &Files) -> Result<()> {
    let dir = tempdir()?;
    let ready = Ready::listen()?;
    let _network = Network::new()?;
    let iperf = Path::new("/usr/bin/iperf3");
    let make = |name: &str, script: &str| initramfs::make(dir.path(), name, &[iperf], script);
    let with_host = format!("rate to-host '-c {HOST}'\nrate from-host '-c {HOST} -R'");
    let host = make("host", &script(0, &with_host))?;
    let server = make("server", &script(0, "echo LISTENS\niperf3 -s"))?;
    let client = make("client", &script(1, "rate between '-c 10.231.7.2'"))?;
    // QEMU takes none that another one has open.
    let disks = ["disk0", "disk1"].map(|name| dir.path().join(name));
    for disk in &disks {
        std::fs::write(disk, [0; 1 << 20])?;
    }
    let vm = |initramfs, number: usize| Vm {
        files,
        initramfs,
        memory_mib: 192,
        disk: disks[number].as_path(),
        tap: Some(tap(number)),
    };

    let mut sides = MONITORS.map(|_| Side::default());
    for _ in 0..ROUNDS {
        for (monitor, side) in MONITORS.into_iter().zip(&mut sides) {
            let guest = Running::start(monitor, &vm(&host, 0), &ready).await?;
            let to_host = guest.number("to-host").await? / 1e3;
            let from_host = guest.number("from-host").await? / 1e3;
            guest.end().await?;
            eprintln!("net: {monitor:?}: to host {to_host:.0}, from host {from_host:.0} Mbit/s");
            side.to_host.push(to_host);
            side.from_host.push(from_host);

            let first = Running::start(monitor, &vm(&server, 0), &ready).await?;
            first.shows("LISTENS").await?;
            let second = Running::start(monitor, &vm(&client, 1), &ready).await?;
            let between = second.number("between").await? / 1e3;
            first.end().await?;
            second.end().await?;
            eprintln!("net: {monitor:?}: between {between:.0} Mbit/s");
            side.between.push(between);
        }
    }
    let [ours, theirs, vhost] = &sides;
    let aim = Some(Aim::AtLeast(1.0));
    heading("network, Mbit/s");
    for (peer, title, aim) in [
        (theirs, "", aim),
        // For comparison: their data path is in the host's kernel.
        (vhost, ", vhost-net", None),
    ] {
        ratio(
            &format!("to host{title}"),
            &ours.to_host,
            &peer.to_host,
            aim,
        );
        ratio(
            &format!("from host{title}"),
            &ours.from_host,
            &peer.from_host,
            aim,
        );
        ratio(
            &format!("pod to pod{title}"),
            &ours.between,
            &peer.between,
            aim,
        );
    }
    Ok(())
}
