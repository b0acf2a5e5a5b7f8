//! A guest's FUSE driver, on queues in a memory of its own.

use std::io;
use std::mem::size_of;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent};
use virtio_queue::{Queue, QueueT};
use virtiofsd::fuse::{
    CreateIn, EntryOut, InHeader, InitInCompat, InitInExt, InitOut, Opcode, OpenIn, OpenOut,
    OutHeader, ReadIn, WriteIn,
};
use virtiofsd::soft_idmap::{GuestGid, GuestUid};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use crate::devices::fs::{Fs, QUEUE_SIZES};
use crate::devices::hostile::descriptor;
use crate::devices::test_driver::Irqs;
use crate::devices::{Device, Io, Poller};
use crate::files::channel::OUT_HEADER_LEN;
use crate::files::on_thread;
use crate::transport::place_rings;

/// Queues.
pub(super) const HIPRIO: usize = 0;
pub(super) const REQUESTS: usize = 1;

/// The inode of the directory itself.
pub(super) const ROOT: u64 = 1;

/// Flags of descriptors.
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;

/// Where a request and its reply lie.
pub(super) const REQUEST: u64 = 0x10_0000;
pub(super) const REPLY: u64 = 0x40_0000;

/// FUSE_SUBMOUNTS | FUSE_INIT_EXT, and FUSE_CREATE_SUPP_GROUP in the upper half.
const INIT_FLAGS: u32 = 1 << 27 | 1 << 30;
const INIT_FLAGS2: u32 = 1 << 2;

/// How long the file server may take on a busy machine, in milliseconds.
const WAIT: u16 = 60_000;

pub(super) struct Guest {
    pub(super) fs: Fs,
    pub(super) mem: GuestMemoryMmap,
    pub(super) queues: Vec<Queue>,
    pub(super) epoll: Arc<Epoll>,
    pub(super) irqs: Irqs,
    pub(super) next_avail: [u16; 2],
    /// Of the process that makes requests; its gid as well.
    pub(super) uid: u32,
}

/// Addresses of a queue's descriptors, available and used ring.
fn ring(queue: usize) -> (u64, u64, u64) {
    let base = 0x1_0000 * (queue as u64 + 1);
    (base, base + 0x4000, base + 0x8000)
}

/// Where a descriptor of a queue lies.
pub(super) fn descriptor_place(queue: usize, index: u16) -> u64 {
    ring(queue).0 + 16 * u64::from(index)
}

impl Guest {
    pub(super) fn new(files: OwnedFd) -> Self {
        let mut fs = Fs::new(files, "shared").unwrap();
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
        fs.start(Poller::new(epoll.clone(), 0)).unwrap();
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
        let queues = (0..2)
            .map(|index| {
                let (desc, avail, used) = ring(index);
                let mut queue = Queue::new(QUEUE_SIZES[index]).unwrap();
                queue.set_size(QUEUE_SIZES[index]);
                place_rings(&mut queue, [desc, avail, used]);
                queue.set_event_idx(true);
                queue.set_ready(true);
                queue
            })
            .collect();
        Self {
            fs,
            mem,
            queues,
            epoll,
            irqs: Irqs::default(),
            next_avail: [0; 2],
            uid: 0,
        }
    }

    /// With the file system mounted.
    pub(super) fn mounted(root: &Path) -> Self {
        Self::mounted_from(on_thread::start(root, None, || {}).unwrap())
    }

    pub(super) fn mounted_from(files: OwnedFd) -> Self {
        let mut guest = Self::new(files);
        let init = InitInCompat {
            major: 7,
            minor: 38,
            max_readahead: 1 << 20,
            flags: INIT_FLAGS,
        };
        let ext = InitInExt {
            flags2: INIT_FLAGS2,
            ..InitInExt::default()
        };
        let out: InitOut = guest
            .call(Opcode::Init, 0, &[init.as_slice(), ext.as_slice()])
            .unwrap();
        assert_eq!(out.major, 7);
        guest
    }

    pub(super) fn describe(
        &self,
        queue: usize,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = GuestAddress(descriptor_place(queue, index));
        let bytes = descriptor((addr, len, flags, next));
        self.mem.write_slice(&bytes, at).unwrap();
    }

    pub(super) fn offer(&mut self, queue: usize, head: u16) {
        let (_, avail, _) = ring(queue);
        let next = &mut self.next_avail[queue];
        let slot = u64::from(*next % QUEUE_SIZES[queue]);
        self.mem
            .write_obj(head, GuestAddress(avail + 4 + 2 * slot))
            .unwrap();
        *next = next.wrapping_add(1);
        self.mem
            .store(*next, GuestAddress(avail + 2), Ordering::Release)
            .unwrap();
    }

    pub(super) fn kick(&mut self, queue: usize) -> io::Result<()> {
        let mut io = Io {
            mem: &self.mem,
            queues: &mut self.queues,
            irq: &self.irqs,
        };
        self.fs.kicked(queue, &mut io)
    }

    /// Has the device handle its events until all that was offered is back.
    pub(super) fn settle(&mut self) {
        while (0..2).any(|queue| self.used(queue) != self.next_avail[queue]) {
            self.turn().unwrap();
        }
    }

    /// Waits for events and has the device handle them.
    pub(super) fn turn(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 4];
        let ready = self.epoll.wait(&mut events, WAIT).unwrap();
        assert!(ready > 0, "nothing happens any more");
        for event in &events[..ready] {
            let mut io = Io {
                mem: &self.mem,
                queues: &mut self.queues,
                irq: &self.irqs,
            };
            self.fs
                .host_ready(event.data() as u32, event.events(), &mut io)?;
        }
        Ok(())
    }

    pub(super) fn used(&self, queue: usize) -> u16 {
        let (_, _, used) = ring(queue);
        self.mem
            .load(GuestAddress(used + 2), Ordering::Acquire)
            .unwrap()
    }

    /// The length of the reply last returned.
    fn last_used_len(&self, queue: usize) -> u32 {
        let (_, _, used) = ring(queue);
        let slot = u64::from(self.used(queue).wrapping_sub(1) % QUEUE_SIZES[queue]);
        self.mem
            .read_obj(GuestAddress(used + 4 + 8 * slot + 4))
            .unwrap()
    }

    /// Sends `request` as it is; the reply's header and body.
    pub(super) fn exchange(&mut self, request: &[u8], room: u32) -> Option<(OutHeader, Vec<u8>)> {
        self.mem
            .write_slice(request, GuestAddress(REQUEST))
            .unwrap();
        let len = request.len() as u32;
        self.describe(REQUESTS, 0, REQUEST, len, NEXT, 1);
        self.describe(REQUESTS, 1, REPLY, room, WRITE, 0);
        self.offer(REQUESTS, 0);
        self.kick(REQUESTS).unwrap();
        self.settle();
        let len = self.last_used_len(REQUESTS) as usize;
        if len == 0 {
            return None;
        }
        assert!(len as u32 <= room, "more than there is room for");
        let mut reply = vec![0; len];
        self.mem
            .read_slice(&mut reply, GuestAddress(REPLY))
            .unwrap();
        let (header, body) = reply.split_at(OUT_HEADER_LEN);
        let header: OutHeader = read(header);
        assert_eq!(header.len as usize, len);
        Some((header, body.to_vec()))
    }

    pub(super) fn call_bytes(
        &mut self,
        opcode: Opcode,
        nodeid: u64,
        body: &[&[u8]],
    ) -> Result<Vec<u8>, io::Error> {
        let body = body.concat();
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode: opcode as u32,
            unique: 4711,
            nodeid,
            uid: GuestUid::from(self.uid),
            gid: GuestGid::from(self.uid),
            pid: 1,
            total_extlen: 0,
            padding: 0,
        };
        let request = [header.as_slice(), &body].concat();
        let (header, body) = self.exchange(&request, 1 << 20).expect("a reply");
        assert_eq!(header.unique, 4711);
        if header.error == 0 {
            Ok(body)
        } else {
            Err(io::Error::from_raw_os_error(-header.error))
        }
    }

    pub(super) fn call<T: ByteValued>(
        &mut self,
        opcode: Opcode,
        nodeid: u64,
        body: &[&[u8]],
    ) -> io::Result<T> {
        Ok(read(&self.call_bytes(opcode, nodeid, body)?))
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> io::Result<EntryOut> {
        self.call(Opcode::Lookup, parent, &[name.as_bytes(), b"\0"])
    }

    pub(super) fn create(&mut self, parent: u64, name: &str) -> io::Result<(EntryOut, OpenOut)> {
        let create = CreateIn {
            flags: (libc::O_CREAT | libc::O_RDWR) as u32,
            mode: libc::S_IFREG | 0o644,
            ..CreateIn::default()
        };
        let body = [create.as_slice(), name.as_bytes(), b"\0"];
        let out = self.call_bytes(Opcode::Create, parent, &body)?;
        let (entry, open) = out.split_at(size_of::<EntryOut>());
        Ok((read(entry), read(open)))
    }

    pub(super) fn read_file(&mut self, node: u64) -> io::Result<Vec<u8>> {
        let open = OpenIn {
            flags: libc::O_RDONLY as u32,
            open_flags: 0,
        };
        let open: OpenOut = self.call(Opcode::Open, node, &[open.as_slice()])?;
        let request = ReadIn {
            fh: open.fh,
            size: 65_536,
            ..ReadIn::default()
        };
        self.call_bytes(Opcode::Read, node, &[request.as_slice()])
    }

    pub(super) fn write_file(&mut self, node: u64, fh: u64, bytes: &[u8]) {
        let request = WriteIn {
            fh,
            size: bytes.len() as u32,
            ..WriteIn::default()
        };
        self.call_bytes(Opcode::Write, node, &[request.as_slice(), bytes])
            .unwrap();
    }
}

/// The object at the start of `bytes`, whatever their alignment.
fn read<T: ByteValued>(bytes: &[u8]) -> T {
    // SAFETY: any bytes are a valid `ByteValued`.
    let mut object: T = unsafe { std::mem::zeroed() };
    object
        .as_mut_slice()
        .copy_from_slice(&bytes[..size_of::<T>()]);
    object
}
