//! `make bench-kvm`: the `kvm` machine beside QEMU's `microvm` machine with the
//! same kernel, initramfs, disk and tap. `e2e/node/bench.sh` runs it once for
//! each round of each part, as root on a node whose KVM runs ordinary guests,
//! and then with all samples for the table.
//!
//! usage: kvm round PART NUMBER GUEST VMM READER, or kvm table < SAMPLES
//!
//! GUEST is the directory of the guest's kernel and initramfs, VMM is
//! `drupe-vmm`, READER the guest's program that reads disks. Samples are lines
//! of JSON on standard output. A guest that never said anything ends a round
//! with the exit code 125, as a node that stands still.

mod boot;
mod disk;
mod drupe;
mod figures;
mod host;
mod idle;
mod initramfs;
mod net;
mod proc;
mod qemu;
#[path = "../../tests/shared/mod.rs"]
mod shared;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::vm::{Monitor, Silent};

/// Samples of each figure.
const ROUNDS: usize = 5;

const NODE_STANDS_STILL: u8 = 125;

/// What the programs under test are made of.
pub struct Files {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub vmm: PathBuf,
    pub reader: PathBuf,
}

/// `monitors` in this round's order: whoever comes first has a colder node.
pub fn in_turn<const N: usize>(mut monitors: [Monitor; N], round: usize) -> [Monitor; N] {
    monitors.rotate_left(round % N);
    monitors
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            if error.is::<Silent>() {
                NODE_STANDS_STILL.into()
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut next = |what: &'static str| args.next().context(what);
    match next("what to do: round or table")?.as_str() {
        "table" => figures::table(),
        "round" => {
            let part = next("no PART")?;
            let number = next("no NUMBER")?.parse().context("NUMBER")?;
            let guest = PathBuf::from(next("no GUEST")?);
            let files = Files {
                kernel: guest.join("kernel-kvm"),
                initramfs: guest.join("initramfs"),
                vmm: next("no VMM")?.into(),
                reader: next("no READER")?.into(),
            };
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(round(&part, number, &files))
        }
        other => bail!("{other:?} is neither round nor table"),
    }
}

async fn round(part: &str, number: usize, files: &Files) -> Result<()> {
    match part {
        "boot" => boot::round(files, number).await,
        "idle-drupe" => idle::measure(files, Monitor::Drupe).await,
        "idle-qemu" => idle::measure(files, Monitor::Qemu { vhost_net: false }).await,
        "disk" => disk::round(files, number).await,
        "net-host" => net::host_round(files, number).await,
        "net-pods" => net::pods_round(files, number).await,
        other => bail!("no part {other:?}"),
    }
}
