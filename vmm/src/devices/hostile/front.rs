//! A vhost-user front end as a script wants it: a guest's kernel that has been
//! taken over may say anything there.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::Script;
use super::targets::Ended;
use crate::devices::blk::Blk;
use crate::event_loop::EventLoop;
use crate::transport::vhost_user::VhostUser;

/// What the back end may take to see the end of a script.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longer than any message: it completes the last one, and as a message of
/// its own it breaks the protocol.
const FILLER: [u8; 8192] = [0; 8192];

const BASE: u64 = 0x40_0000;
const SIZE: u64 = 0x10_0000;
const MESSAGES: usize = 128;

/// # Panics
///
/// When the device's loop does not come to the end of the script.
pub fn vhost_user(mut script: Script<'_>) -> io::Result<Ended> {
    let path = Socket::new();
    let transport = VhostUser::listen(&path.0, Arc::default())?;
    let mut event_loop = EventLoop::new("hostile")?;
    event_loop.add("disk", Blk::empty("image")?, Box::new(transport))?;
    let (sender, failed) = channel();
    event_loop.spawn(|| Ok(()), move |reason| drop(sender.send(reason)))?;
    let mut front = Front {
        socket: UnixStream::connect(&path.0)?,
    };
    front.socket.set_write_timeout(Some(PATIENCE))?;
    for _ in 0..MESSAGES {
        if script.is_over() || front.say(&mut script).is_err() {
            break;
        }
    }
    // An error means that the other end has closed already.
    let _ = front.socket.write_all(&FILLER);
    match failed.recv_timeout(PATIENCE) {
        Ok(reason) => Ok(Some(reason)),
        Err(e) => panic!("the device's loop is stuck: {e}"),
    }
}

struct Front {
    socket: UnixStream,
}

impl Front {
    fn say(&mut self, script: &mut Script<'_>) -> io::Result<()> {
        let kind = script.byte();
        if kind.is_multiple_of(16) {
            // No message at all.
            let most = usize::from(script.byte());
            let bytes = script.bytes(most);
            return self.send(bytes, &[]);
        }
        if kind % 16 < 4 {
            return self.set_up();
        }
        let request = match kind % 16 {
            4 => u32::from(script.byte()),
            _ => script.pick(&[1u32, 2, 3, 5, 8, 9, 10, 12, 13, 14, 15, 16, 18, 21, 24, 25]),
        };
        let count = script.byte() % 20;
        let mut payload = Vec::new();
        for _ in 0..count {
            let n = u64::from(script.byte());
            let word = match script.byte() % 8 {
                0 => script.long(),
                1 => u64::MAX - n,
                2 => BASE + (n << 8),
                3 => SIZE,
                4 => 256,
                5 => 1 << 8 | n,
                _ => n,
            };
            payload.extend(word.to_ne_bytes());
        }
        payload.truncate(
            payload
                .len()
                .saturating_sub(usize::from(script.byte() % 12)),
        );
        let flags = script.pick(&[1u32, 1, 1, 1, 1, 1, 5, 0]);
        let fds = (0..script.byte() % 4)
            .map(|_| descriptor(script.byte()))
            .collect::<io::Result<Vec<_>>>()?;
        let size = match script.byte() {
            255 => script.len(),
            _ => payload.len() as u32,
        };
        self.send(&message([request, flags, size], &payload), &fds)
    }

    /// What a front end that follows the rules says.
    fn set_up(&self) -> io::Result<()> {
        let words =
            |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|w| w.to_ne_bytes()).collect() };
        let vring = |num: u64| num << 32;
        for (request, payload, fd) in [
            (2, words(&[1 << 32 | 1 << 30]), None),
            (5, words(&[1, BASE, SIZE, BASE, 0]), Some(0)),
            (8, words(&[vring(256)]), None),
            (10, words(&[vring(0)]), None),
            (9, words(&[0, BASE, BASE + 0x2000, BASE + 0x1000, 0]), None),
            (12, words(&[0]), Some(1)),
            (18, words(&[vring(1)]), None),
        ] {
            let fds = fd.map(descriptor).transpose()?;
            let header = [request, 1, payload.len() as u32];
            self.send(&message(header, &payload), fds.as_slice())?;
        }
        Ok(())
    }

    fn send(&self, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let cmsgs = if raw.is_empty() { &[][..] } else { &rights };
        let (socket, iov) = (self.socket.as_raw_fd(), [IoSlice::new(bytes)]);
        sendmsg::<()>(socket, &iov, cmsgs, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }
}

/// A message; its header is request, flags and the payload's size.
fn message(header: [u32; 3], payload: &[u8]) -> Vec<u8> {
    let header = header.map(u32::to_ne_bytes);
    [header.as_flattened(), payload].concat()
}

fn descriptor(kind: u8) -> io::Result<OwnedFd> {
    match kind % 5 {
        0 => {
            let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC)?);
            file.set_len(SIZE)?;
            Ok(file.into())
        }
        1 => Ok(EventFd::from_value(1)?.into()),
        2 => Ok(File::open("/dev/null")?.into()),
        3 => Ok(io::pipe()?.0.into()),
        _ => Ok(UnixStream::pair()?.0.into()),
    }
}

/// A path for a socket, which is removed again.
struct Socket(PathBuf);

impl Socket {
    fn new() -> Self {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("drupe-hostile-{}-{number}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
