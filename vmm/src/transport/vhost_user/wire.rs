//! Messages of the vhost-user protocol, from the back end's side.
//!
//! Only what `virtio_uml` (Linux, arch/um/drivers/virtio_uml.c) sends. The
//! `vhost` crate's request handler is not used: it insists on REPLY_ACK, which
//! costs two context switches for each of some fifteen messages a device,
//! blocks in the middle of a message, and cannot send a config change.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::transport::invalid;

const HEADER: usize = 12;
/// The largest is SET_CONFIG with a whole configuration space.
const MAX_PAYLOAD: usize = CONFIG_HEADER + MAX_CONFIG;
pub const MAX_CONFIG: usize = 4096;
const CONFIG_HEADER: usize = 12;
/// Memory regions in one table; `virtio_uml` sends one.
pub const MAX_REGIONS: usize = 8;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;

/// Payload of SET_VRING_{KICK,CALL,ERR}: queue in the low byte, this bit when
/// no descriptor came.
const NO_FD: u64 = 1 << 8;

#[derive(Debug)]
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    SetMemTable(Vec<(Region, OwnedFd)>),
    SetVringNum(Vring),
    SetVringAddr(VringAddr),
    SetVringBase(Vring),
    SetVringKick(usize, Option<OwnedFd>),
    SetVringCall(usize, Option<OwnedFd>),
    SetVringErr,
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    SetVringEnable(Vring),
    SetBackendReqFd(OwnedFd),
    GetConfig { offset: u32, size: u32, flags: u32 },
    SetConfig { offset: u32, data: Vec<u8> },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    pub guest_addr: u64,
    pub size: u64,
    pub user_addr: u64,
    pub mmap_offset: u64,
}

#[derive(Debug, Clone, Copy)]
pub struct Vring {
    pub index: usize,
    pub num: u32,
}

#[derive(Debug, Clone, Copy)]
pub struct VringAddr {
    pub index: usize,
    pub desc: u64,
    pub used: u64,
    pub avail: u64,
}

/// The stream of messages from the front end. Never blocks: a message that
/// has come in part waits for its rest.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// What [`Connection::next`] found.
#[derive(Debug)]
pub enum Next {
    Message(Message),
    Nothing,
    Closed,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            buffer: Vec::new(),
            fds: Vec::new(),
        })
    }

    pub fn next(&mut self) -> io::Result<Next> {
        loop {
            let wanted = match self.buffer.len() {
                0..HEADER => HEADER,
                _ => HEADER + self.payload_len()?,
            };
            if self.buffer.len() == wanted {
                let message = self.parse();
                self.buffer.clear();
                self.fds.clear();
                return Ok(Next::Message(message?));
            }
            match self.receive(wanted)? {
                // Even in the middle of a message: the guest's kernel has died.
                Some(0) => return Ok(Next::Closed),
                Some(_) => {}
                None => return Ok(Next::Nothing),
            }
        }
    }

    fn payload_len(&self) -> io::Result<usize> {
        let size = self.u32(8)? as usize;
        if size > MAX_PAYLOAD {
            return Err(invalid(format!("vhost-user message of {size} bytes")));
        }
        Ok(size)
    }

    /// Reads towards `wanted` bytes; `None` when there are none yet.
    fn receive(&mut self, wanted: usize) -> io::Result<Option<usize>> {
        let have = self.buffer.len();
        self.buffer.resize(wanted, 0);
        let mut space = cmsg_space!([i32; MAX_REGIONS]);
        let mut iov = [IoSliceMut::new(&mut self.buffer[have..])];
        let received = recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        );
        let (bytes, truncated) = match received {
            Ok(message) => {
                for cmsg in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(raw) = cmsg {
                        self.fds.extend(raw.into_iter().map(|fd| {
                            // SAFETY: the kernel has just made this descriptor
                            // for this process and nothing else knows it.
                            unsafe { OwnedFd::from_raw_fd(fd) }
                        }));
                    }
                }
                (
                    Some(message.bytes),
                    message.flags.contains(MsgFlags::MSG_CTRUNC),
                )
            }
            Err(Errno::EAGAIN | Errno::EINTR) => (None, false),
            Err(Errno::ECONNRESET) => (Some(0), false),
            Err(e) => return Err(e.into()),
        };
        self.buffer.truncate(have + bytes.unwrap_or(0));
        if truncated || self.fds.len() > MAX_REGIONS {
            return Err(invalid("too many descriptors in a vhost-user message"));
        }
        Ok(bytes)
    }

    fn parse(&mut self) -> io::Result<Message> {
        let flags = self.u32(4)?;
        if flags & VERSION_MASK != VERSION || flags & REPLY != 0 {
            return Err(invalid(format!("vhost-user flags {flags:#x}")));
        }
        let code = self.u32(0)?;
        let message = match code {
            1 => Message::GetFeatures,
            2 => Message::SetFeatures(self.u64(HEADER)?),
            3 => Message::SetOwner,
            5 => Message::SetMemTable(self.regions()?),
            8 => Message::SetVringNum(self.vring()?),
            9 => Message::SetVringAddr(VringAddr {
                index: self.u32(HEADER)? as usize,
                desc: self.u64(HEADER + 8)?,
                used: self.u64(HEADER + 16)?,
                avail: self.u64(HEADER + 24)?,
            }),
            10 => Message::SetVringBase(self.vring()?),
            12 => {
                let (index, fd) = self.vring_fd()?;
                Message::SetVringKick(index, fd)
            }
            13 => {
                let (index, fd) = self.vring_fd()?;
                Message::SetVringCall(index, fd)
            }
            14 => Message::SetVringErr,
            15 => Message::GetProtocolFeatures,
            16 => Message::SetProtocolFeatures(self.u64(HEADER)?),
            18 => Message::SetVringEnable(self.vring()?),
            21 => Message::SetBackendReqFd(self.one_fd()?),
            24 => Message::GetConfig {
                offset: self.u32(HEADER)?,
                size: self.u32(HEADER + 4)?,
                flags: self.u32(HEADER + 8)?,
            },
            25 => {
                let size = self.u32(HEADER + 4)? as usize;
                let data = &self.buffer[HEADER..];
                let data = data.get(CONFIG_HEADER..CONFIG_HEADER + size.min(MAX_CONFIG));
                Message::SetConfig {
                    offset: self.u32(HEADER)?,
                    data: data.ok_or_else(short)?.to_vec(),
                }
            }
            _ => return Err(invalid(format!("vhost-user request {code}"))),
        };
        Ok(message)
    }

    fn u32(&self, at: usize) -> io::Result<u32> {
        let bytes = self.buffer.get(at..at + 4).ok_or_else(short)?;
        Ok(u32::from_ne_bytes(
            bytes.try_into().map_err(io::Error::other)?,
        ))
    }

    fn u64(&self, at: usize) -> io::Result<u64> {
        let bytes = self.buffer.get(at..at + 8).ok_or_else(short)?;
        Ok(u64::from_ne_bytes(
            bytes.try_into().map_err(io::Error::other)?,
        ))
    }

    fn vring(&self) -> io::Result<Vring> {
        Ok(Vring {
            index: self.u32(HEADER)? as usize,
            num: self.u32(HEADER + 4)?,
        })
    }

    fn one_fd(&mut self) -> io::Result<OwnedFd> {
        match self.fds.len() {
            1 => self.fds.pop().ok_or_else(short),
            n => Err(invalid(format!("{n} descriptors where one belongs"))),
        }
    }

    fn vring_fd(&mut self) -> io::Result<(usize, Option<OwnedFd>)> {
        let value = self.u64(HEADER)?;
        let fd = match value & NO_FD {
            0 => Some(self.one_fd()?),
            _ => None,
        };
        Ok(((value & 0xff) as usize, fd))
    }

    fn regions(&mut self) -> io::Result<Vec<(Region, OwnedFd)>> {
        let count = self.u32(HEADER)? as usize;
        if count == 0 || count > MAX_REGIONS || count != self.fds.len() {
            return Err(invalid(format!(
                "{count} memory regions with {} descriptors",
                self.fds.len()
            )));
        }
        let regions = (0..count)
            .map(|i| {
                let at = HEADER + 8 + 32 * i;
                Ok(Region {
                    guest_addr: self.u64(at)?,
                    size: self.u64(at + 8)?,
                    user_addr: self.u64(at + 16)?,
                    mmap_offset: self.u64(at + 24)?,
                })
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(regions.into_iter().zip(self.fds.drain(..)).collect())
    }

    pub fn reply_u64(&self, request: u32, value: u64) -> io::Result<()> {
        self.send(request, &value.to_ne_bytes())
    }

    pub fn reply_config(&self, offset: u32, flags: u32, data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len()).map_err(io::Error::other)?;
        let mut payload = Vec::with_capacity(CONFIG_HEADER + data.len());
        for word in [offset, size, flags] {
            payload.extend_from_slice(&word.to_ne_bytes());
        }
        payload.extend_from_slice(data);
        self.send(24, &payload)
    }

    fn send(&self, request: u32, payload: &[u8]) -> io::Result<()> {
        let header = header(request, VERSION | REPLY, payload.len())?;
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&header), IoSlice::new(payload)],
            &[],
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        )?;
        if sent != HEADER + payload.len() {
            // The front end asks one thing at a time, so there is always room.
            return Err(invalid("the vhost-user front end does not read"));
        }
        Ok(())
    }
}

/// The back end's own request CONFIG_CHANGE_MSG.
pub fn config_change() -> io::Result<[u8; HEADER]> {
    header(2, VERSION, 0)
}

fn header(request: u32, flags: u32, size: usize) -> io::Result<[u8; HEADER]> {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&request.to_ne_bytes());
    header[4..8].copy_from_slice(&flags.to_ne_bytes());
    let size = u32::try_from(size).map_err(io::Error::other)?;
    header[8..].copy_from_slice(&size.to_ne_bytes());
    Ok(header)
}

fn short() -> io::Error {
    invalid("vhost-user message too short")
}
