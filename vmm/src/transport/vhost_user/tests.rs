//! A front end as `virtio_uml` is one, and some that are not.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, sendmsg};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::devices::blk::Blk;
use crate::event_loop::{DeviceRef, EventLoop};

const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough for a loop on a busy machine to do something wrong.
const MOMENT: Duration = Duration::from_millis(50);

const BASE: u64 = 0x40_0000;
const SIZE: u64 = 0x10_0000;

struct FrontEnd {
    socket: UnixStream,
    failed: Receiver<String>,
    disk: DeviceRef<Blk>,
    memory: File,
    _dir: tempfile::TempDir,
}

impl FrontEnd {
    fn connect() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let transport = VhostUser::listen(&path, Arc::default()).unwrap();
        let mut event_loop = EventLoop::new("test").unwrap();
        let disk = event_loop
            .add("disk", Blk::empty("image0").unwrap(), Box::new(transport))
            .unwrap();
        let (sender, failed) = channel();
        event_loop
            .spawn(|| Ok(()), move |reason| sender.send(reason).unwrap())
            .unwrap();
        let socket = UnixStream::connect(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let memory = File::from(memfd_create("guest", MFdFlags::empty()).unwrap());
        memory.set_len(SIZE).unwrap();
        Self {
            socket,
            failed,
            disk,
            memory,
            _dir: dir,
        }
    }

    fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut message = Vec::new();
        for word in [request, 1, payload.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let cmsgs: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let iov = [IoSlice::new(&message)];
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &iov,
            cmsgs,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }

    fn words(&self, request: u32, words: &[u32]) {
        let payload: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        self.send(request, &payload, &[]);
    }

    fn long(&self, request: u32, value: u64, fds: &[BorrowedFd<'_>]) {
        self.send(request, &value.to_ne_bytes(), fds);
    }

    fn reply(&mut self, request: u32) -> Vec<u8> {
        let mut header = [0; 12];
        self.socket.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request, 5));
        let mut payload = vec![0; word(8) as usize];
        self.socket.read_exact(&mut payload).unwrap();
        payload
    }

    fn ask(&mut self, request: u32) -> u64 {
        self.send(request, &[], &[]);
        u64::from_ne_bytes(self.reply(request).try_into().unwrap())
    }

    fn set_memory(&self, base: u64, user: u64, size: u64) {
        let mut payload = Vec::new();
        for word in [1u32, 0] {
            payload.extend(word.to_ne_bytes());
        }
        for word in [base, size, user, 0] {
            payload.extend(word.to_ne_bytes());
        }
        self.send(5, &payload, &[self.memory.as_fd()]);
    }

    fn set_addr(&self, desc: u64) {
        let mut payload = vec![0; 8];
        for word in [desc, desc + 0x2000, desc + 0x1000, u64::MAX] {
            payload.extend(word.to_ne_bytes());
        }
        self.send(9, &payload, &[]);
    }

    /// Sets up the queue but for its kick; the line that calls the driver.
    fn set_up_queue(&self) -> UnixStream {
        self.set_memory(BASE, BASE, SIZE);
        self.words(8, &[0, 256]);
        self.words(10, &[0, 0]);
        self.set_addr(BASE);
        let (call, call_end) = UnixStream::pair().unwrap();
        call.set_read_timeout(Some(PATIENCE)).unwrap();
        self.long(13, 0, &[call_end.as_fd()]);
        call
    }

    /// What `virtio_uml` says before it sets up queues.
    fn greet(&mut self) {
        self.send(3, &[], &[]);
        let features = self.ask(1);
        assert_ne!(features & F_PROTOCOL_FEATURES, 0);
        assert_eq!(self.ask(15), PROTOCOL_FEATURES);
        self.long(16, PROTOCOL_FEATURES, &[]);
        self.long(
            2,
            features & (1 << VIRTIO_F_VERSION_1 | F_PROTOCOL_FEATURES),
            &[],
        );
    }
}

#[test]
fn a_driver_sets_the_device_up_and_is_served() {
    let mut front = FrontEnd::connect();
    front.greet();
    let (requests, requests_end) = UnixStream::pair().unwrap();
    front.send(21, &[], &[requests_end.as_fd()]);
    let mut call = front.set_up_queue();

    // GET_ID, made available and kicked before the device listens.
    let desc = |at: u64, addr: u64, len: u32, flags: u16, next: u16| {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        front.memory.write_all_at(&bytes, 16 * at).unwrap();
    };
    desc(0, BASE + 0x8000, 16, 1, 1);
    desc(1, BASE + 0x9000, 20, 3, 2);
    desc(2, BASE + 0xa000, 1, 2, 0);
    front.memory.write_all_at(&[8], 0x8000).unwrap();
    front.memory.write_all_at(&[0xff], 0xa000).unwrap();
    front.memory.write_all_at(&[1, 0], 0x1002).unwrap();
    let kick = EventFd::from_value(1).unwrap();
    front.long(12, 0, &[kick.as_fd()]);
    front.words(18, &[0, 1]);
    call.read_exact(&mut [0; 8]).unwrap();
    let mut id = [0; 7];
    front.memory.read_exact_at(&mut id, 0x9000).unwrap();
    assert_eq!(&id, b"image0\0");
    let mut status = [0xff];
    front.memory.read_exact_at(&mut status, 0xa000).unwrap();
    assert_eq!(status, [0]);

    // A disk is attached from another thread: a message, a new capacity.
    let mut layer = tempfile::tempfile().unwrap();
    layer.write_all(&[1; 8192]).unwrap();
    front
        .disk
        .post(|disk, io| disk.attach(vec![layer], io).unwrap())
        .unwrap();
    let mut change = [0; 12];
    (&requests).read_exact(&mut change).unwrap();
    assert_eq!(change[..4], 2u32.to_ne_bytes());
    let config: Vec<u32> = [0, 8, 0].into_iter().chain([0; 2]).collect();
    front.words(24, &config);
    let reply = front.reply(24);
    assert_eq!(reply[12..], 16u64.to_le_bytes());

    // The driver goes: no failure, and nobody else may connect.
    drop(front.socket);
    assert_eq!(
        front.failed.recv_timeout(MOMENT),
        Err(RecvTimeoutError::Timeout)
    );
    assert!(UnixStream::connect(front._dir.path().join("socket")).is_err());
}

/// As `virtio_uml` does for a driver that changed its mind about features.
#[test]
fn without_protocol_features_a_queue_is_enabled_by_its_kick() {
    let front = FrontEnd::connect();
    front.long(2, 1 << VIRTIO_F_VERSION_1, &[]);
    let mut call = front.set_up_queue();
    // A chain of one readable buffer: no request, so it is just returned.
    let mut desc = (BASE + 0x8000).to_le_bytes().to_vec();
    desc.extend([16, 0, 0, 0, 0, 0, 0, 0]);
    front.memory.write_all_at(&desc, 0).unwrap();
    front.memory.write_all_at(&[1, 0], 0x1002).unwrap();
    let kick = EventFd::from_value(1).unwrap();
    front.long(12, 0, &[kick.as_fd()]);
    call.read_exact(&mut [0; 8]).unwrap();
    let mut used = [0; 2];
    front.memory.read_exact_at(&mut used, 0x2002).unwrap();
    assert_eq!(used, [1, 0]);
}

#[test]
fn a_message_in_pieces_is_waited_for() {
    let mut front = FrontEnd::connect();
    let mut message = Vec::new();
    for word in [1u32, 1, 0] {
        message.extend(word.to_ne_bytes());
    }
    for byte in message {
        assert!(front.failed.try_recv().is_err());
        front.socket.write_all(&[byte]).unwrap();
    }
    assert_eq!(front.reply(1).len(), 8);
}

#[test]
fn what_breaks_the_protocol_ends_the_machine_with_a_reason() {
    type Case = (&'static str, fn(&mut FrontEnd));
    let cases: [Case; 14] = [
        ("request 99", |f| f.send(99, &[], &[])),
        ("flags", |f| {
            f.socket
                .write_all(&[1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0])
                .unwrap()
        }),
        ("message of", |f| {
            f.socket
                .write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1])
                .unwrap();
        }),
        ("too short", |f| f.send(2, &[0; 7], &[])),
        ("not offered", |f| f.long(2, u64::MAX, &[])),
        ("not offered", |f| f.long(16, 1, &[])),
        ("queue 1 of 1", |f| f.words(8, &[1, 256])),
        ("queue of 100", |f| f.words(8, &[0, 100])),
        ("queue of 512", |f| f.words(8, &[0, 512])),
        ("outside of memory", |f| {
            f.set_memory(BASE, BASE, SIZE);
            f.words(8, &[0, 256]);
            f.set_addr(BASE + SIZE - 0x1800);
            f.words(18, &[0, 1]);
        }),
        ("addresses differ", |f| f.set_memory(BASE, 0, SIZE)),
        ("past the end of its file", |f| {
            f.set_memory(BASE, BASE, SIZE * 2)
        }),
        ("descriptors where one belongs", |f| f.long(12, 0, &[])),
        ("device disk", |f| {
            let file = tempfile::tempfile().unwrap();
            f.long(12, 0, &[file.as_fd()]);
        }),
    ];
    for (reason, act) in cases {
        let mut front = FrontEnd::connect();
        act(&mut front);
        let failure = front.failed.recv_timeout(PATIENCE).expect(reason);
        assert!(failure.contains(reason), "{reason}: {failure}");
    }
}
