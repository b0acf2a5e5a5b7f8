//! TCP from and to a guest through its tap, and between two guests.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::figures::{Figure, tell};
use crate::host::{Ready, run, tempdir};
use crate::vm::{Monitor, Running, Tap, Vm};
use crate::{Files, in_turn, initramfs};

const NETNS: &str = "bench-kvm";
const HOST: &str = "10.231.7.1";
const TAPS: [&str; 2] = ["tap0", "tap1"];
const MONITORS: [Monitor; 3] = [
    Monitor::Drupe,
    Monitor::Qemu { vhost_net: false },
    Monitor::Qemu { vhost_net: true },
];

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
        "rate() {{\n\
         told=$(iperf3 -f k -O 1 -t 4 $2)\n\
         echo \"$told\"\n\
         echo \"$1 $(echo \"$told\" | awk '/receiver/ {{ print $7 }}')\"\n\
         }}\n\
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

/// What every guest of a round is made from.
struct Setup {
    dir: TempDir,
    ready: Ready,
    _network: Network,
}

impl Setup {
    fn new() -> Result<Self> {
        Ok(Self {
            dir: tempdir()?,
            ready: Ready::listen()?,
            _network: Network::new()?,
        })
    }

    /// Starts the guest of this number, whose init runs `then`.
    async fn start(
        &self,
        files: &Files,
        monitor: Monitor,
        number: usize,
        then: &str,
    ) -> Result<Running> {
        let [initramfs, disk] = ["initramfs", "disk"].map(|name| format!("{name}{number}"));
        let iperf = Path::new("/usr/bin/iperf3");
        let script = script(number, then);
        let initramfs = initramfs::make(self.dir.path(), &initramfs, &[iperf], &script)?;
        // QEMU takes none that another one has open.
        let disk = self.dir.path().join(disk);
        std::fs::write(&disk, [0; 1 << 20])?;
        let vm = Vm {
            initramfs: &initramfs,
            memory_mib: 192,
            tap: Some(tap(number)),
            ..Vm::plain(files, &disk)
        };
        Running::start(monitor, &vm, &self.ready).await
    }
}

/// One guest of each monitor and its host.
pub async fn host_round(files: &Files, number: usize) -> Result<()> {
    let setup = Setup::new()?;
    let with_host = format!("rate to-host '-c {HOST}'\nrate from-host '-c {HOST} -R'");
    for monitor in in_turn(MONITORS, number) {
        let guest = setup.start(files, monitor, 0, &with_host).await?;
        for (figure, key) in [(Figure::ToHost, "to-host"), (Figure::FromHost, "from-host")] {
            tell(figure, monitor, guest.number(key).await? / 1e3)?;
        }
        guest.end().await?;
    }
    Ok(())
}

/// Two guests of each monitor.
pub async fn pods_round(files: &Files, number: usize) -> Result<()> {
    let setup = Setup::new()?;
    for monitor in in_turn(MONITORS, number) {
        let listens = "echo LISTENS\niperf3 -s";
        let first = setup.start(files, monitor, 0, listens).await?;
        first.shows("LISTENS").await?;
        let connects = "rate between '-c 10.231.7.2'";
        let second = setup.start(files, monitor, 1, connects).await?;
        let between = second.number("between").await? / 1e3;
        tell(Figure::PodToPod, monitor, between)?;
        first.end().await?;
        second.end().await?;
    }
    Ok(())
}
