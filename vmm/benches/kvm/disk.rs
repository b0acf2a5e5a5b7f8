//! Reads of a disk that the host has in its memory.

use std::fs::File;
use std::io::Write;

use anyhow::Result;

use crate::figures::{Figure, tell};
use crate::host::{Ready, tempdir};
use crate::vm::{Monitor, Running, Vm};
use crate::{Files, in_turn, initramfs};

const MIB: usize = 64;
const MONITORS: [Monitor; 2] = [Monitor::Drupe, Monitor::Qemu { vhost_net: false }];

pub async fn round(files: &Files, number: usize) -> Result<()> {
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
        initramfs: &initramfs,
        ..Vm::plain(files, &disk)
    };
    for monitor in in_turn(MONITORS, number) {
        let running = Running::start(monitor, &vm, &ready).await?;
        for (figure, key) in [
            (Figure::SequentialReads, "sequential"),
            (Figure::RandomReads, "random"),
        ] {
            tell(figure, monitor, running.number(key).await?)?;
        }
        running.end().await?;
    }
    Ok(())
}
