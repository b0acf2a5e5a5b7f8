//! Reads of a disk that the host has in its memory.

use std::fs::File;
use std::io::Write;

use anyhow::Result;

use crate::figures::{Aim, Samples, heading, ratio};
use crate::host::{Ready, tempdir};
use crate::vm::{Monitor, Running, Vm};
use crate::{Files, ROUNDS, initramfs};

const MIB: usize = 64;
const QEMU: Monitor = Monitor::Qemu { vhost_net: false };

pub async fn measure(files: &Files) -> Result<()> {
    let dir = tempdir()?;
    let ready = Ready::listen()?;
    let script = "reader /dev/vda 2";
    let initramfs = initramfs::make(dir.path(), "initramfs", &[&files.reader], script)?;
    let disk = dir.path().join("disk");
    let mut file = File::create(&disk)?;
    for number in 0..MIB {
        file.write_all(&vec![number as u8; 1 << 20])?;
    }
    let vm = Vm {
        files,
        initramfs: &initramfs,
        memory_mib: 128,
        disk: &disk,
        tap: None,
    };
    let mut sides = [(); 2].map(|()| (Samples::default(), Samples::default()));
    for _ in 0..ROUNDS {
        for (monitor, side) in [Monitor::Drupe, QEMU].into_iter().zip(&mut sides) {
            let running = Running::start(monitor, &vm, &ready).await?;
            let sequential = running.number("sequential").await?;
            let random = running.number("random").await?;
            eprintln!("disk: {monitor:?}: {sequential:.0} MiB/s, {random:.0} reads/s");
            side.0.push(sequential);
            side.1.push(random);
            running.end().await?;
        }
    }
    let [ours, theirs] = &sides;
    let aim = Some(Aim::AtLeast(1.0));
    heading("disk, in the host's memory");
    ratio("1 MiB sequential, MiB/s", &ours.0, &theirs.0, aim);
    ratio("4 KiB random, reads/s", &ours.1, &theirs.1, aim);
    Ok(())
}
