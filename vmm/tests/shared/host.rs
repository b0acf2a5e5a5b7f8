//! What of the host a VMM is given, as the daemon makes it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};

/// The listening end of a VMM's control socket.
pub fn control_listener(path: &Path) -> Result<OwnedFd> {
    let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
    let listener = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&listener, Backlog::new(8)?)?;
    Ok(listener)
}

/// A network namespace that `ip netns` made.
pub fn netns(name: &str) -> Result<File> {
    File::open(Path::new("/run/netns").join(name)).with_context(|| name.to_owned())
}

/// Opens the tap `name` in a network namespace.
pub fn open_tap(namespace: &str, name: &str) -> Result<OwnedFd> {
    let namespace = netns(namespace)?;
    let tap = name.to_owned();
    let opened = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        attach(&tap)
    });
    match opened.join() {
        Ok(opened) => opened.with_context(|| name.to_owned()),
        Err(_) => bail!("opening a tap panicked"),
    }
}

fn attach(name: &str) -> Result<OwnedFd> {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
    ensure!(result == 0, "{}", io::Error::last_os_error());
    Ok(tun.into())
}
