//! One entry for each device: makes it, plays a script, and says how the
//! machine ended if it did. An `Err` is the host's and not the script's.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockname, listen, socket,
};

use vmm_client::RateLimit;

use super::canary::Canary;
pub use super::front::vhost_user;
pub use super::output::{framing, logs};
pub use super::registers::mmio;
use super::templates::{self, Templates};
pub use super::world::World;
use super::{Script, guest::play};
use crate::devices::balloon::Balloon;
use crate::devices::blk::Blk;
use crate::devices::fs::Fs;
use crate::devices::net::Net;
use crate::devices::rng::Rng;
use crate::devices::vsock::{HostPorts, Vsock};
use crate::files::on_thread;

const GUEST_CID: u32 = 3;
/// Ends of connections kept by a host's side; the oldest is closed then.
const ENDS: usize = 16;

/// How the machine was ended by what the script did.
pub type Ended = Option<String>;

pub fn balloon(mut script: Script<'_>) -> io::Result<Ended> {
    play(
        Balloon::new(0)?,
        &mut script,
        templates::balloon(),
        |balloon, io, what| balloon.set_target(u64::from(what) << 16, io),
    )
}

pub fn rng(mut script: Script<'_>) -> io::Result<Ended> {
    let device = Rng::new(Path::new("/dev/urandom"))?;
    play(device, &mut script, Templates::default(), |_, _, _| {})
}

pub fn blk(mut script: Script<'_>) -> io::Result<Ended> {
    if script.byte() & 1 == 0 {
        let disk = Blk::scratch("scratch", memory_file(1 << 20)?).map_err(io::Error::other)?;
        // Off, or a rate that a short script meets.
        let disk = disk.with_rate_limit(RateLimit {
            requests_per_second: NonZeroU64::new(u64::from(script.byte()) << 8),
            ..RateLimit::default()
        })?;
        return play(disk, &mut script, templates::blk(), |_, _, _| {});
    }
    let shrinking = memory_file(100_000)?;
    let view = shrinking.try_clone()?;
    let mut layers = Some(vec![memory_file(5000)?, shrinking]);
    play(
        Blk::empty("image")?,
        &mut script,
        templates::blk(),
        move |disk, io, what| match what % 4 {
            0 => disk.detach(io),
            1 => drop(view.set_len(4096)),
            _ => {
                if let Some(files) = layers.take() {
                    let _ = disk.attach(files, io);
                }
            }
        },
    )
}

pub(super) fn memory_file(len: u64) -> io::Result<File> {
    let file = File::from(memfd_create("disk", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(len)?;
    file.write_all_at(b"some bytes", 0)?;
    Ok(file)
}

/// On a tap, with one queue or two, in a network namespace of its own.
pub fn net_world() -> io::Result<World> {
    World::new(|| Ok(unshare(CloneFlags::CLONE_NEWNET)?), net)
}

fn net(mut script: Script<'_>) -> io::Result<Ended> {
    let taps = tap(2 - usize::from(script.byte() & 1))?;
    let net = Net::new(taps, [2, 0, 0, 0, 0, 1], Some(1400));
    let net = net.map_err(io::Error::other)?;
    play(net, &mut script, templates::net(), |_, _, _| {})
}

/// Queues of a new tap, whose name the kernel finds: one of the last script's
/// may still be there, held by a process that is about to be executed.
fn tap(queues: usize) -> io::Result<Vec<File>> {
    nix::ioctl_readwrite_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    (0..queues)
        .map(|_| {
            let tun = File::options()
                .read(true)
                .write(true)
                .open("/dev/net/tun")?;
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            // SAFETY: TUNSETIFF reads one ifreq and fills in the name.
            unsafe { tun_set_iff(tun.as_raw_fd(), &mut request) }?;
            Ok(tun)
        })
        .collect()
}

pub fn vsock(mut script: Script<'_>) -> io::Result<Ended> {
    let (listener, address) = abstract_listener()?;
    let (sender, accepted) = std::sync::mpsc::channel();
    let ports = move |port: u32| {
        if port % 4 == 3 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        sender.send(theirs).map_err(io::Error::other)?;
        Ok(ours)
    };
    let device = Vsock::new(GUEST_CID, listener, Box::new(Answers(ports)))?;
    let mut ends = VecDeque::new();
    play(
        device,
        &mut script,
        templates::vsock(GUEST_CID),
        move |_, _, what| {
            ends.extend(accepted.try_iter());
            // The host's side: connects, says something, closes.
            match what % 4 {
                0 => {
                    if let Ok(client) = UnixStream::connect_addr(&address) {
                        let _ = client.set_nonblocking(true);
                        let _ = (&client).write(format!("CONNECT {}\n", what / 4).as_bytes());
                        ends.push_back(client);
                    }
                }
                1 => drop(ends.pop_front()),
                _ => {
                    for end in &mut ends {
                        let _ = end.write(&[what; 3000]);
                    }
                }
            }
            ends.drain(..ends.len().saturating_sub(ENDS));
        },
    )
}

/// A socket without a file, so that nothing is left behind.
fn abstract_listener() -> io::Result<(UnixListener, std::os::unix::net::SocketAddr)> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // An unnamed address: the kernel finds a free abstract one.
    bind(fd.as_raw_fd(), &UnixAddr::new_unnamed())?;
    listen(&fd, Backlog::new(16)?)?;
    let _: UnixAddr = getsockname(fd.as_raw_fd())?;
    let listener = UnixListener::from(fd);
    let address = listener.local_addr()?;
    Ok((listener, address))
}

struct Answers<F>(F);

impl<F: FnMut(u32) -> io::Result<UnixStream> + Send> HostPorts for Answers<F> {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        (self.0)(port)
    }
}

/// On a small directory, in a mount namespace in which nothing else can be
/// written.
pub fn fs_world() -> io::Result<World> {
    World::new(make_directory, fs)
}

/// Nobody outside of the namespace sees it.
fn make_directory() -> io::Result<()> {
    let dir = std::env::temp_dir();
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, "/", none, flags, none)?;
    let tmpfs = Some("tmpfs");
    let options = Some("size=4m,nr_inodes=1k");
    mount(tmpfs, &dir, tmpfs, MsFlags::empty(), options)?;
    Canary::new(&dir)?;
    Ok(())
}

/// The same directory in the beginning of each script.
fn fs(mut script: Script<'_>) -> io::Result<Ended> {
    let canary = Canary::at(&std::env::temp_dir())?;
    let (files, server) = on_thread::start_joinable(&canary.share(), None, || {})?;
    let device = Fs::new(files, "shared").map_err(io::Error::other)?;
    let ended = play(device, &mut script, templates::fs(), |_, _, _| {})?;
    // It has gone with the device once all that it was asked is done.
    if let Err(panic) = server.join() {
        std::panic::resume_unwind(panic);
    }
    canary.assert_unharmed()?;
    canary.clear_share()?;
    Ok(ended)
}

/// Any device, against a guest that changes what it said; the script's first
/// byte says which.
pub struct Raced {
    net: World,
    fs: World,
}

impl Raced {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            net: net_world()?,
            fs: fs_world()?,
        })
    }

    /// # Panics
    ///
    /// When the device did.
    pub fn play(&self, script: &[u8]) -> io::Result<Ended> {
        let Some((device, rest)) = script.split_first() else {
            return Ok(None);
        };
        match device % 6 {
            0 => balloon(Script::racing(rest)),
            1 => rng(Script::racing(rest)),
            2 => blk(Script::racing(rest)),
            3 => vsock(Script::racing(rest)),
            4 => self.net.race(rest),
            _ => self.fs.race(rest),
        }
    }
}
