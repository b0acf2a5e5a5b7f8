//! `make bench-kvm`: the `kvm` machine beside QEMU's `microvm` machine with the
//! same kernel, initramfs, disk and tap, in one run. Runs as root on a node
//! whose KVM runs ordinary guests.
//!
//! usage: kvm GUEST VMM READER [boot] [disk] [net]
//!
//! GUEST is the directory of the guest's kernel and initramfs, VMM is
//! `drupe-vmm`, READER the guest's program that reads disks. Without a part,
//! all are run.

mod boot;
mod disk;
mod drupe;
mod figures;
mod host;
mod initramfs;
mod net;
mod proc;
mod qemu;
#[path = "../../tests/shared/mod.rs"]
mod shared;
mod vm;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// Times that each thing is measured, in turn with its peer.
const ROUNDS: usize = 5;

/// What the programs under test are made of.
pub struct Files {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub vmm: PathBuf,
    pub reader: PathBuf,
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut path = |what: &str| args.next().map(PathBuf::from).context(what.to_owned());
    let guest = path("usage: kvm GUEST VMM READER [boot] [disk] [net]")?;
    let files = Files {
        kernel: guest.join("kernel-kvm"),
        initramfs: guest.join("initramfs"),
        vmm: path("no VMM")?,
        reader: path("no READER")?,
    };
    let parts: Vec<String> = args.collect();
    if let Some(unknown) = parts
        .iter()
        .find(|part| !["boot", "disk", "net"].contains(&part.as_str()))
    {
        bail!("no part {unknown:?}: boot, disk or net");
    }
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        if wanted("boot") {
            boot::measure(&files).await?;
        }
        if wanted("disk") {
            disk::measure(&files).await?;
        }
        if wanted("net") {
            net::measure(&files).await?;
        }
        Ok(())
    })
}
