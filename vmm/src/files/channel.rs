//! The channel between the monitor's virtio-fs device and the file server: a
//! SOCK_SEQPACKET socket, one message a request and one an answer.
//!
//! ```text
//! request: key u64 | room u32 | 0 u32 | a FUSE request, header first
//! answer:  key u64 | handle u64 | a FUSE reply, header first (may be empty)
//! ```
//! All little-endian. `room` is the most that the reply may take. A request with
//! the key [`NO_ANSWER`] gets none. With an answer that opens a file comes its
//! descriptor, and `handle` is the number by which the guest will name it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, setsockopt, socketpair, sockopt,
};

/// The largest FUSE request but for WRITE: SETXATTR with a value of 64 KiB, the
/// most that Linux takes, and a name.
pub const MAX_REQUEST: usize = 68 * 1024;
/// The largest reply but for that of READ: a value or a list of names of
/// extended attributes. Directories are read in pieces of at most this.
pub const MAX_REPLY: usize = 68 * 1024;

/// `struct fuse_in_header` and `struct fuse_out_header`.
pub const IN_HEADER_LEN: usize = 40;
pub const OUT_HEADER_LEN: usize = 16;

/// The key of what is not to be answered.
pub const NO_ANSWER: u64 = 0;

const PREFIX_LEN: usize = 16;

/// A socket buffer that takes the largest message; the kernel doubles it, and
/// what it takes by default is enough on every node seen.
const SOCKET_BUFFER: usize = 128 * 1024;

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Makes the monitor's end one that never waits.
pub fn prepare(channel: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(channel, FcntlArg::F_GETFL)?);
    fcntl(channel, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// The two ends of a new channel: the monitor's and the file server's.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (monitor, files) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    for end in [&monitor, &files] {
        setsockopt(end, sockopt::SndBuf, &SOCKET_BUFFER)?;
    }
    Ok((monitor, files))
}

/// A reply that says `errno` to `request`.
pub fn error_reply(request: &[u8], errno: i32) -> Vec<u8> {
    let mut reply = vec![0; OUT_HEADER_LEN];
    let length = OUT_HEADER_LEN as u32;
    reply[..4].copy_from_slice(&length.to_le_bytes());
    reply[4..8].copy_from_slice(&(-errno).to_le_bytes());
    if let Some(unique) = request.get(8..16) {
        reply[8..].copy_from_slice(unique);
    }
    reply
}

/// Sends one request. `WouldBlock` on a socket that does not block and is full.
pub fn ask(channel: impl AsFd, key: u64, room: usize, request: &[u8]) -> io::Result<()> {
    let mut prefix = [0; PREFIX_LEN];
    prefix[..8].copy_from_slice(&key.to_le_bytes());
    let room = u32::try_from(room).map_err(io::Error::other)?;
    prefix[8..12].copy_from_slice(&room.to_le_bytes());
    send(channel, &prefix, request, None)
}

fn send(channel: impl AsFd, prefix: &[u8], body: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
    let raw = fd.map(AsRawFd::as_raw_fd);
    let rights = raw
        .as_ref()
        .map(|fd| [ControlMessage::ScmRights(std::slice::from_ref(fd))]);
    let iov = [IoSlice::new(prefix), IoSlice::new(body)];
    loop {
        match sendmsg::<()>(
            channel.as_fd().as_raw_fd(),
            &iov,
            rights.as_ref().map_or(&[], |rights| &rights[..]),
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Err(Errno::EINTR) => {}
            // Packets are sent whole.
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}

/// A request, as the file server takes it; the buffer is used again.
#[derive(Default)]
pub struct Asked {
    bytes: Vec<u8>,
    len: usize,
}

impl Asked {
    /// Waits for the next; false when the other end was closed. A request that
    /// is not of the shape above is an error: the monitor makes none.
    pub fn receive(&mut self, channel: impl AsFd) -> io::Result<bool> {
        self.bytes.resize(PREFIX_LEN + MAX_REQUEST, 0);
        self.len = match receive(channel, &mut self.bytes, None)? {
            Some((len, _)) => len,
            None => return Ok(false),
        };
        if self.len < PREFIX_LEN + IN_HEADER_LEN {
            return Err(invalid("a request shorter than its header"));
        }
        let room = self.room();
        let answered = self.key() != NO_ANSWER;
        if room > MAX_REPLY || (answered && room < OUT_HEADER_LEN) {
            return Err(invalid(
                "a request with no room, or too much, for its reply",
            ));
        }
        Ok(true)
    }

    pub fn key(&self) -> u64 {
        number(&self.bytes[..8])
    }

    /// The most that the reply may take.
    pub fn room(&self) -> usize {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.bytes[8..12]);
        u32::from_le_bytes(bytes) as usize
    }

    pub fn request(&self) -> &[u8] {
        &self.bytes[PREFIX_LEN..self.len]
    }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub key: u64,
    /// What was opened, and its number.
    pub opened: Option<(u64, OwnedFd)>,
    /// The FUSE reply.
    pub body: Vec<u8>,
}

impl Answer {
    pub(super) fn new(key: u64, opened: Option<(u64, OwnedFd)>, body: Vec<u8>) -> Self {
        Self { key, opened, body }
    }

    pub(super) fn send(&self, channel: impl AsFd) -> io::Result<()> {
        let mut prefix = [0; PREFIX_LEN];
        prefix[..8].copy_from_slice(&self.key.to_le_bytes());
        let handle = self.opened.as_ref().map_or(0, |(handle, _)| *handle);
        prefix[8..].copy_from_slice(&handle.to_le_bytes());
        let fd = self.opened.as_ref().map(|(_, fd)| fd);
        send(channel, &prefix, &self.body, fd)
    }

    /// The next answer; `None` when the other end was closed. `WouldBlock` on a
    /// socket that does not block and has none. Fails where an answer came
    /// without the descriptor that belongs to it: this process has no room for
    /// another.
    pub fn receive(channel: impl AsFd) -> io::Result<Option<Self>> {
        let mut bytes = vec![0; PREFIX_LEN + MAX_REPLY];
        let mut fd = None;
        let Some((len, truncated)) = receive(channel, &mut bytes, Some(&mut fd))? else {
            return Ok(None);
        };
        if len < PREFIX_LEN {
            return Err(invalid("an answer without its prefix"));
        }
        let (key, handle) = (number(&bytes[..8]), number(&bytes[8..16]));
        bytes.truncate(len);
        bytes.drain(..PREFIX_LEN);
        if truncated {
            // The guest hears that there are too many files open.
            let unique = [&[0; 8], bytes.get(8..16).unwrap_or(&[0; 8])].concat();
            bytes = error_reply(&unique, libc::ENFILE);
        }
        Ok(Some(Self {
            key,
            opened: fd.map(|fd| (handle, fd)),
            body: bytes,
        }))
    }
}

fn number(bytes: &[u8]) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(bytes);
    u64::from_le_bytes(value)
}

/// Length, and whether descriptors got lost.
fn receive(
    channel: impl AsFd,
    bytes: &mut [u8],
    take_fd: Option<&mut Option<OwnedFd>>,
) -> io::Result<Option<(usize, bool)>> {
    let mut space = cmsg_space!([i32; 1]);
    let mut iov = [IoSliceMut::new(bytes)];
    let received = loop {
        match recvmsg::<()>(
            channel.as_fd().as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            // The peer has gone without reading all it was sent. What it sent
            // itself comes first, the end after that.
            Err(Errno::EINTR | Errno::ECONNRESET) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            fds.extend(raw.into_iter().map(|fd| {
                // SAFETY: the kernel has just made this descriptor for this
                // process and nothing else knows it.
                unsafe { OwnedFd::from_raw_fd(fd) }
            }));
        }
    }
    let (len, flags) = (received.bytes, received.flags);
    if flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(invalid("a message larger than the largest"));
    }
    if let Some(take) = take_fd {
        *take = fds.pop();
    }
    if len == 0 {
        return Ok(None);
    }
    Ok(Some((len, flags.contains(MsgFlags::MSG_CTRUNC))))
}
