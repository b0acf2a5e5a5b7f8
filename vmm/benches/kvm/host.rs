//! What the host has for guests: directories, disks, the port that agents of
//! QEMU's guests connect to.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket,
};
use tempfile::TempDir;
use vmm_client::protocol::READY_PORT;

use crate::vm::PATIENCE;

/// A directory that the jailed VMM may pass through.
pub fn tempdir() -> Result<TempDir> {
    let dir = tempfile::Builder::new().prefix("bench-kvm-").tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

/// The host's vsock port on which QEMU's guests say that their agent is there.
pub struct Ready {
    listener: OwnedFd,
    cid: Cell<u32>,
}

impl Ready {
    pub fn listen() -> Result<Self> {
        run(&["modprobe", "-a", "vhost_vsock", "vhost_net"])?;
        let (family, kind) = (AddressFamily::Vsock, SockType::Stream);
        let listener = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        let address = VsockAddr::new(libc::VMADDR_CID_ANY, READY_PORT);
        bind(listener.as_raw_fd(), &address).context("the port that agents connect to")?;
        listen(&listener, Backlog::new(8)?)?;
        Ok(Self {
            listener,
            cid: Cell::new(100),
        })
    }

    /// An address that no guest has had.
    pub fn next_cid(&self) -> u32 {
        self.cid.set(self.cid.get() + 1);
        self.cid.get()
    }

    /// Waits for an agent's first message.
    pub fn accept(&self) -> Result<()> {
        wait_readable(&self.listener)?;
        let raw = accept(self.listener.as_raw_fd())?;
        // SAFETY: accept(2) returned it, and nothing else owns it.
        let stream = unsafe { OwnedFd::from_raw_fd(raw) };
        wait_readable(&stream)?;
        let mut first = [0; 64];
        let len = File::from(stream).read(&mut first)?;
        ensure!(
            first[..len].starts_with(b"drupe-agent"),
            "{:?}",
            &first[..len]
        );
        Ok(())
    }
}

fn wait_readable(fd: &OwnedFd) -> Result<()> {
    let timeout = PollTimeout::try_from(PATIENCE)?;
    let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    ensure!(poll(&mut polled, timeout)? == 1, "nobody connects");
    Ok(())
}

pub fn run(words: &[&str]) -> Result<()> {
    let [program, args @ ..] = words else {
        bail!("no program");
    };
    let status = Command::new(program).args(args).status();
    let status = status.with_context(|| (*program).to_owned())?;
    ensure!(status.success(), "{words:?}: {status}");
    Ok(())
}

/// A sparse ext4 disk, as the daemon makes a pod's.
pub fn ext4_disk(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("disk");
    File::create(&path)?.set_len(1 << 30)?;
    run(&["mkfs.ext4", "-q", "-F", &path.display().to_string()])?;
    Ok(path)
}

/// Copies a file, its holes as holes.
pub fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let [from, to] = [from, to].map(|path| path.display().to_string());
    run(&["cp", "--sparse=always", &from, &to])
}
