//! virtio-fs (virtio 1.2 §5.11): the guest's way to the pod's shared directory,
//! which the file server serves ([`crate::files`]).
//!
//! A request is copied out of the guest's memory once, and passed on. READ and
//! WRITE are not: they are done here, by descriptors that the file server hands
//! over, so that the data is not copied and the file server needs nothing of the
//! guest's memory. They may wait for the host's disks, so this device has an
//! event loop, and thereby a thread, of its own.
//!
//! The host changes files under the guest: the kubelet swaps the symlink of a
//! ConfigMap, the daemon mounts another volume. The guest may cache, but asks
//! again after a second.

mod open_files;
mod request;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use nix::sys::epoll::EpollFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use virtiofsd::fuse::Opcode;
use vm_memory::GuestMemoryMmap;

use self::open_files::OpenFiles;
use self::request::{Header, LIST_SIZE_AT, ReadIn, WriteIn, u32_at, u64_at};
use super::again::Again;
use super::iov::{self, Iov, OwnedIov};
use super::queue::Chain;
use super::{Device, Io, Poller};
use crate::files::channel::{
    self, Answer, IN_HEADER_LEN, MAX_REPLY, MAX_REQUEST, NO_ANSWER, OUT_HEADER_LEN,
};

/// hiprio (FORGET) and one request queue. Linux lets one request fill the
/// request queue but for a few descriptors: 512 leave room for 1 MiB.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// `struct virtio_fs_config`: a tag padded with zeroes, `num_request_queues`.
const TAG_LEN: usize = 36;
const CONFIG_LEN: usize = TAG_LEN + 4;

/// Requests handled, or answers taken, before other events of the loop have
/// their turn.
const REQUESTS_PER_TURN: usize = 256;

/// Requests that the file server is at work on at once. An honest guest has no
/// more, as each has a descriptor of a queue.
const MAX_ASKED: usize = QUEUE_SIZES[0] as usize + QUEUE_SIZES[1] as usize;

const TOKEN_AGAIN: u32 = 0;
const TOKEN_CHANNEL: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error("{0:?} is not a virtio-fs tag: 1 to {TAG_LEN} bytes without NUL")]
    Tag(String),
    #[error("making the file system device")]
    Setup(#[source] io::Error),
}

/// What the guest can see of the device. Inodes and handles it holds are the
/// file server's to save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The driver's choice of features.
    pub features: u64,
    pub tag: String,
}

pub struct Fs {
    state: State,
    /// To the file server. It does not block.
    channel: OwnedFd,
    /// What the file server is at work on, by key; no more than [`MAX_ASKED`].
    asked: HashMap<u64, Pending>,
    next_key: u64,
    /// What the channel had no room for: nothing is taken off the queues
    /// meanwhile.
    unsent: Option<Unsent>,
    /// The queues may hold requests that were left there for now.
    held_up: bool,
    files: OpenFiles,
    again: Again,
    poller: Option<Poller>,
}

/// A chain that the file server's answer will fill.
struct Pending {
    queue: usize,
    head: u16,
    room: OwnedIov,
}

struct Unsent {
    key: u64,
    room: usize,
    request: Vec<u8>,
}

/// What became of a request.
enum Taken {
    /// It is done, with so many bytes in its chain.
    Done(u32),
    /// The file server has it.
    Passed,
}

impl Fs {
    /// What the file server at the other end of `channel` serves, under the name
    /// `tag`.
    pub fn new(channel: OwnedFd, tag: &str) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_LEN || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        channel::prepare(&channel).map_err(FsError::Setup)?;
        Ok(Self {
            state: State {
                features: 0,
                tag: tag.to_owned(),
            },
            channel,
            asked: HashMap::new(),
            next_key: NO_ANSWER,
            unsent: None,
            held_up: false,
            files: OpenFiles::default(),
            again: Again::new().map_err(FsError::Setup)?,
            poller: None,
        })
    }

    pub fn state(&self) -> State {
        self.state.clone()
    }

    fn serve(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()> {
        if !io.queues.get(index).is_some_and(QueueT::ready) {
            return Ok(());
        }
        for _ in 0..REQUESTS_PER_TURN {
            if self.unsent.is_some() || self.asked.len() >= MAX_ASKED {
                self.held_up = true;
                return Ok(());
            }
            let Some(chain) = io.next_chain(index)? else {
                return Ok(());
            };
            let head = chain.head_index();
            if let Taken::Done(written) = self.take(io.mem, chain, index, head)? {
                io.give_back(index, head, written)?;
                // Each at once: the next one may take its time on the disk.
                io.notify(index)?;
            }
        }
        self.again.ring()
    }

    /// Takes one FUSE request. Fails when the file server is gone.
    fn take(
        &mut self,
        mem: &GuestMemoryMmap,
        chain: Chain<'_>,
        queue: usize,
        head: u16,
    ) -> io::Result<Taken> {
        let Ok((mut readable, mut writable)) = iov::split(chain, mem) else {
            tracing::debug!("virtio-fs: a request outside of guest memory was dropped");
            return Ok(Taken::Done(0));
        };
        let Some(header) = readable.take_bytes::<IN_HEADER_LEN>() else {
            tracing::debug!("virtio-fs: a request shorter than its header was dropped");
            return Ok(Taken::Done(0));
        };
        let header = Header(header);
        if header.is_silent() {
            return self.tell(&header, &readable);
        }
        if writable.len() < OUT_HEADER_LEN {
            tracing::debug!("virtio-fs: a request without room for its reply was dropped");
            return Ok(Taken::Done(0));
        }
        if header.is(Opcode::Read) {
            return Ok(Taken::Done(self.read(&header, readable, writable)));
        }
        if header.is(Opcode::Write) {
            return Ok(Taken::Done(self.write(&header, readable, &writable)));
        }
        if IN_HEADER_LEN + readable.len() > MAX_REQUEST {
            return Ok(Taken::Done(refuse(&header, &writable, libc::E2BIG)));
        }
        let mut request = copy(&header, &readable);
        writable.truncate(MAX_REPLY);
        let room = writable.len();
        self.look_at(&header, &mut request, room);
        let Some(room_of_guest) = writable.into_owned(mem) else {
            return Ok(Taken::Done(0));
        };
        self.next_key += 1;
        let key = self.next_key;
        let pending = Pending {
            queue,
            head,
            room: room_of_guest,
        };
        self.asked.insert(key, pending);
        self.ask(key, room, request)?;
        Ok(Taken::Passed)
    }

    /// What the monitor itself has to know of a request that it passes on.
    fn look_at(&mut self, header: &Header, request: &mut [u8], room: usize) {
        let arguments = request.len() - IN_HEADER_LEN;
        if header.is(Opcode::Init) || header.is(Opcode::Destroy) {
            self.files.clear();
        }
        if header.is(Opcode::Release) && arguments >= size_of::<u64>() {
            self.files.released(u64_at(request, IN_HEADER_LEN));
        }
        if header.lists_a_directory() && request.len() >= LIST_SIZE_AT + 4 {
            let most = u32::try_from(room - OUT_HEADER_LEN).unwrap_or(u32::MAX);
            let size = u32_at(request, LIST_SIZE_AT).min(most);
            request[LIST_SIZE_AT..LIST_SIZE_AT + 4].copy_from_slice(&size.to_le_bytes());
        }
    }

    /// Passes on a request that has no reply.
    fn tell(&mut self, header: &Header, readable: &Iov<'_>) -> io::Result<Taken> {
        // More names in one than fit are more than Linux sends.
        if IN_HEADER_LEN + readable.len() <= MAX_REQUEST {
            self.ask(NO_ANSWER, 0, copy(header, readable))?;
        }
        Ok(Taken::Done(0))
    }

    fn ask(&mut self, key: u64, room: usize, request: Vec<u8>) -> io::Result<()> {
        match channel::ask(&self.channel, key, room, &request) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.unsent = Some(Unsent { key, room, request });
                self.watch_channel(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT)
            }
            sent => sent.map_err(gone),
        }
    }

    /// Whether nothing is left unsent.
    fn send_unsent(&mut self) -> io::Result<bool> {
        let Some(unsent) = self.unsent.take() else {
            return Ok(true);
        };
        match channel::ask(&self.channel, unsent.key, unsent.room, &unsent.request) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.unsent = Some(unsent);
                Ok(false)
            }
            sent => {
                sent.map_err(gone)?;
                self.watch_channel(EpollFlags::EPOLLIN)?;
                Ok(true)
            }
        }
    }

    fn watch_channel(&self, flags: EpollFlags) -> io::Result<()> {
        match &self.poller {
            Some(poller) => poller.modify(&self.channel, TOKEN_CHANNEL, flags),
            None => Ok(()),
        }
    }

    fn read(&self, header: &Header, mut readable: Iov<'_>, mut writable: Iov<'_>) -> u32 {
        let Some(asked) = ReadIn::take(&mut readable) else {
            return refuse(header, &writable, libc::EIO);
        };
        let mut body = writable.clone();
        drop(body.take(OUT_HEADER_LEN));
        match self.files.read(&asked, &mut body) {
            Ok(read) => {
                writable.truncate(OUT_HEADER_LEN);
                reply(header, &writable, 0, read)
            }
            Err(error) => refuse(header, &writable, errno(&error)),
        }
    }

    fn write(&self, header: &Header, mut readable: Iov<'_>, writable: &Iov<'_>) -> u32 {
        let Some(asked) = WriteIn::take(&mut readable) else {
            return refuse(header, writable, libc::EIO);
        };
        // `struct fuse_write_out`: the size and padding.
        let mut out = [0; OUT_HEADER_LEN + 8];
        if writable.len() < out.len() {
            return refuse(header, writable, libc::EIO);
        }
        match self.files.write(&asked, &mut readable) {
            Ok(written) => {
                let size = u32::try_from(written).unwrap_or(u32::MAX);
                out[..OUT_HEADER_LEN].copy_from_slice(&reply_header(header, 0, 8));
                out[OUT_HEADER_LEN..OUT_HEADER_LEN + 4].copy_from_slice(&size.to_le_bytes());
                writable.fill_from(&out);
                out.len() as u32
            }
            Err(error) => refuse(header, writable, errno(&error)),
        }
    }

    /// Takes what the file server has answered.
    fn take_answers(&mut self, io: &mut Io<'_>) -> io::Result<()> {
        for _ in 0..REQUESTS_PER_TURN {
            let answer = match Answer::receive(&self.channel) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                answer => answer.map_err(gone)?,
            };
            let answer = answer.ok_or_else(|| gone(io::ErrorKind::UnexpectedEof.into()))?;
            // One that is not there was asked before the guest reset the device.
            let Some(pending) = self.asked.remove(&answer.key) else {
                continue;
            };
            if let Some((handle, file)) = answer.opened {
                self.files.opened(handle, file);
            }
            let written = pending.room.get().fill_from(&answer.body);
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            io.give_back(pending.queue, pending.head, written)?;
            io.notify(pending.queue)?;
        }
        // Level triggered: the rest is told again.
        Ok(())
    }
}

/// An error of the file server's channel.
fn gone(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("the file server is gone: {error}"))
}

fn copy(header: &Header, readable: &Iov<'_>) -> Vec<u8> {
    let mut request = vec![0; IN_HEADER_LEN + readable.len()];
    request[..IN_HEADER_LEN].copy_from_slice(&header.0);
    readable.copy_to(&mut request[IN_HEADER_LEN..]);
    request
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// `struct fuse_out_header` to a reply whose body has `body` bytes.
fn reply_header(header: &Header, error: i32, body: usize) -> [u8; OUT_HEADER_LEN] {
    let mut out = [0; OUT_HEADER_LEN];
    let len = u32::try_from(OUT_HEADER_LEN + body).unwrap_or(u32::MAX);
    out[0..4].copy_from_slice(&len.to_le_bytes());
    out[4..8].copy_from_slice(&(-error).to_le_bytes());
    out[8..16].copy_from_slice(&header.0[8..16]);
    out
}

/// Writes the header of a reply whose body is there; the bytes of both.
fn reply(header: &Header, writable: &Iov<'_>, error: i32, body: usize) -> u32 {
    writable.fill_from(&reply_header(header, error, body));
    u32::try_from(OUT_HEADER_LEN + body).unwrap_or(u32::MAX)
}

fn refuse(header: &Header, writable: &Iov<'_>, error: i32) -> u32 {
    reply(header, writable, error, 0)
}

impl Device for Fs {
    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn set_features(&mut self, features: u64) {
        self.state.features = features;
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; CONFIG_LEN];
        let tag = self.state.tag.as_bytes();
        config[..tag.len()].copy_from_slice(tag);
        config[TAG_LEN..].copy_from_slice(&1_u32.to_le_bytes());
        super::read_config_bytes(&config, offset, data);
    }

    fn start(&mut self, poller: Poller) -> io::Result<()> {
        self.again.watch(&poller, TOKEN_AGAIN)?;
        poller.add(&self.channel, TOKEN_CHANNEL, EpollFlags::EPOLLIN)?;
        self.poller = Some(poller);
        Ok(())
    }

    fn kicked(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<()> {
        self.serve(index, io)
    }

    fn host_ready(&mut self, token: u32, _flags: EpollFlags, io: &mut Io<'_>) -> io::Result<()> {
        if token == TOKEN_CHANNEL {
            self.take_answers(io)?;
            if !self.send_unsent()? || !std::mem::take(&mut self.held_up) {
                return Ok(());
            }
        } else {
            self.again.take()?;
        }
        for index in 0..QUEUE_SIZES.len() {
            self.serve(index, io)?;
        }
        Ok(())
    }

    /// Open files and inodes of the file server go with the guest's next FUSE
    /// INIT. What it is at work on has no chain any more.
    fn reset(&mut self) {
        self.state.features = 0;
        self.asked.clear();
        self.files.clear();
    }
}
