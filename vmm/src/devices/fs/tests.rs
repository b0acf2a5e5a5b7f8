//! The device as a guest's FUSE driver sees it, on real directories.

use std::fs;
use std::io::ErrorKind;
use std::mem::size_of;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use proptest::prelude::*;
use virtio_queue::Queue;
use virtiofsd::fuse::{
    ATTR_SUBMOUNT, AttrOut, CreateIn, EntryOut, InHeader, InitInCompat, InitInExt, InitOut, OpenIn,
    OpenOut, OutHeader, ReadIn, WriteIn,
};
use virtiofsd::soft_idmap::{GuestGid, GuestUid};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::*;
use crate::devices::Interrupt;

const HIPRIO: usize = 0;
const REQUESTS: usize = 1;
const ROOT: u64 = 1;
/// A uid that a pod's VMM might have.
const POD: libc::c_long = 777_777;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// FUSE_SUBMOUNTS | FUSE_INIT_EXT, and FUSE_CREATE_SUPP_GROUP in the upper half.
const INIT_FLAGS: u32 = 1 << 27 | 1 << 30;
const INIT_FLAGS2: u32 = 1 << 2;

#[derive(Default)]
struct Interrupts(AtomicUsize);

impl Interrupt for Interrupts {
    fn queue_used(&self, _index: usize) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn config_changed(&self) {}
}

struct Guest {
    fs: Fs,
    mem: GuestMemoryMmap,
    queues: Vec<Queue>,
    epoll: Arc<Epoll>,
    irq: Interrupts,
    next_avail: [u16; 2],
    uid: u32,
}

/// Addresses of a queue's descriptors, available and used ring.
fn ring(queue: usize) -> (u64, u64, u64) {
    let base = 0x1_0000 * (queue as u64 + 1);
    (base, base + 0x4000, base + 0x8000)
}

const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x40_0000;

impl Guest {
    fn new(root: &Path) -> Self {
        let mut fs = Fs::new(root, "shared").unwrap();
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
        fs.start(Poller::new(epoll.clone(), 0)).unwrap();
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
        let queues = (0..2)
            .map(|index| {
                let (desc, avail, used) = ring(index);
                let mut queue = Queue::new(QUEUE_SIZES[index]).unwrap();
                queue.set_size(QUEUE_SIZES[index]);
                queue.set_desc_table_address(Some(desc as u32), Some(0));
                queue.set_avail_ring_address(Some(avail as u32), Some(0));
                queue.set_used_ring_address(Some(used as u32), Some(0));
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
            irq: Interrupts::default(),
            next_avail: [0; 2],
            uid: 0,
        }
    }

    /// With the file system mounted.
    fn mounted(root: &Path) -> Self {
        let mut guest = Self::new(root);
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

    fn describe(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = ring(queue).0 + 16 * u64::from(index);
        self.mem.write_obj(addr, GuestAddress(at)).unwrap();
        self.mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn offer(&mut self, queue: usize, head: u16) {
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

    fn kick(&mut self, queue: usize) -> io::Result<()> {
        let mut io = Io {
            mem: &self.mem,
            queues: &mut self.queues,
            irq: &self.irq,
        };
        self.fs.kicked(queue, &mut io)
    }

    fn used(&self, queue: usize) -> u16 {
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
    fn exchange(&mut self, request: &[u8], room: u32) -> Option<(OutHeader, Vec<u8>)> {
        self.mem
            .write_slice(request, GuestAddress(REQUEST))
            .unwrap();
        let len = request.len() as u32;
        self.describe(REQUESTS, 0, REQUEST, len, NEXT, 1);
        self.describe(REQUESTS, 1, REPLY, room, WRITE, 0);
        self.offer(REQUESTS, 0);
        self.kick(REQUESTS).unwrap();
        assert_eq!(self.used(REQUESTS), self.next_avail[REQUESTS]);
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

    fn call_bytes(
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

    fn call<T: ByteValued>(
        &mut self,
        opcode: Opcode,
        nodeid: u64,
        body: &[&[u8]],
    ) -> io::Result<T> {
        Ok(read(&self.call_bytes(opcode, nodeid, body)?))
    }

    fn lookup(&mut self, parent: u64, name: &str) -> io::Result<EntryOut> {
        self.call(Opcode::Lookup, parent, &[name.as_bytes(), b"\0"])
    }

    fn create(&mut self, parent: u64, name: &str) -> io::Result<(EntryOut, OpenOut)> {
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

    fn read_file(&mut self, node: u64) -> io::Result<Vec<u8>> {
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

    fn write_file(&mut self, node: u64, fh: u64, bytes: &[u8]) {
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

/// A tmpfs for the length of a test.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn mount(at: &'a Path, options: &str) -> Self {
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(at)
            .status()
            .unwrap();
        assert!(status.success(), "mounting a tmpfs");
        Self(at)
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        // Lazily: the device may hold a directory of it.
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn the_guest_reads_and_writes_files_of_the_shared_directory() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("hello"), "from the host").unwrap();
    let mut guest = Guest::mounted(dir.path());

    let file = guest.lookup(ROOT, "hello").unwrap();
    assert_eq!(guest.read_file(file.nodeid).unwrap(), b"from the host");

    let (entry, open) = guest.create(ROOT, "answer").unwrap();
    guest.write_file(entry.nodeid, open.fh, b"from the guest");
    let written = fs::read(dir.path().join("answer")).unwrap();
    assert_eq!(written, b"from the guest");
    assert!(guest.irq.0.load(Ordering::SeqCst) > 0);
}

#[test]
fn what_the_host_changes_is_seen_within_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("..data");
    symlink("one", &link).unwrap();
    let mut guest = Guest::mounted(dir.path());
    let first = guest.lookup(ROOT, "..data").unwrap();
    assert_eq!((first.entry_valid, first.entry_valid_nsec), (1, 0));
    assert_eq!((first.attr_valid, first.attr_valid_nsec), (1, 0));
    let target = guest.call_bytes(Opcode::Readlink, first.nodeid, &[]);
    assert_eq!(target.unwrap(), b"one");

    // As the kubelet updates a ConfigMap.
    symlink("two", dir.path().join("..tmp")).unwrap();
    fs::rename(dir.path().join("..tmp"), &link).unwrap();
    let second = guest.lookup(ROOT, "..data").unwrap();
    assert_ne!(second.nodeid, first.nodeid);
    let target = guest.call_bytes(Opcode::Readlink, second.nodeid, &[]);
    assert_eq!(target.unwrap(), b"two");
}

#[test]
fn a_volume_mounted_later_appears_as_a_mount_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    let mut guest = Guest::mounted(dir.path());
    let before = guest.lookup(ROOT, "volume").unwrap();
    assert_eq!(before.attr.flags & ATTR_SUBMOUNT, 0);

    let _mount = Tmpfs::mount(&volume, "size=64k");
    fs::write(volume.join("file"), "in it").unwrap();
    let after = guest.lookup(ROOT, "volume").unwrap();
    assert_eq!(after.attr.flags & ATTR_SUBMOUNT, ATTR_SUBMOUNT);
    let file = guest.lookup(after.nodeid, "file").unwrap();
    assert_eq!(guest.read_file(file.nodeid).unwrap(), b"in it");
}

/// Makes the calling thread what the jail makes of the VMM: the pod's uid and
/// a few capabilities.
fn become_the_pod() {
    let kept: CapsHashSet = [
        Capability::CAP_CHOWN,
        Capability::CAP_DAC_OVERRIDE,
        Capability::CAP_FOWNER,
        Capability::CAP_FSETID,
        Capability::CAP_MKNOD,
        Capability::CAP_SETFCAP,
        Capability::CAP_SETGID,
        Capability::CAP_SETUID,
    ]
    .into_iter()
    .collect();
    nix::sys::prctl::set_keepcaps(true).unwrap();
    let none: *const libc::gid_t = std::ptr::null();
    // SAFETY: system calls on ids of this thread; an empty list of groups.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_setgroups, 0, none), 0);
        assert_eq!(libc::syscall(libc::SYS_setresgid, POD, POD, POD), 0);
        assert_eq!(libc::syscall(libc::SYS_setresuid, POD, POD, POD), 0);
    }
    caps::clear(None, CapSet::Inheritable).unwrap();
    caps::set(None, CapSet::Effective, &kept).unwrap();
    caps::set(None, CapSet::Permitted, &kept).unwrap();
}

#[test]
fn files_are_their_guest_users_though_the_vmm_is_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    for (name, mode) in [("open", 0o1777), ("roots", 0o700)] {
        fs::create_dir(path.join(name)).unwrap();
        fs::set_permissions(path.join(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    let owner = |name: &str| {
        let file = fs::metadata(path.join(name)).unwrap();
        (file.uid(), file.gid())
    };
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            become_the_pod();
            let mut guest = Guest::mounted(path);
            let open = guest.lookup(ROOT, "open").unwrap().nodeid;
            let roots = guest.lookup(ROOT, "roots").unwrap().nodeid;

            guest.create(open, "by-root").unwrap();
            guest.uid = 1000;
            guest.create(open, "by-user").unwrap();
            let denied = guest.create(roots, "by-user").unwrap_err();
            assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
            // And back again.
            guest.uid = 0;
            let (file, _) = guest.create(roots, "by-root").unwrap();

            // What root may: give a file away, and use it still.
            let chown = virtiofsd::fuse::SetattrIn {
                valid: 0b110,
                uid: GuestUid::from(33_u32),
                gid: GuestGid::from(44_u32),
                ..Default::default()
            };
            let out: AttrOut = guest
                .call(Opcode::Setattr, file.nodeid, &[chown.as_slice()])
                .unwrap();
            assert_eq!(out.attr.uid, GuestUid::from(33_u32));
            guest.read_file(file.nodeid).unwrap();
        });
        served.join().unwrap();
    });
    assert_eq!(owner("open/by-root"), (0, 0));
    assert_eq!(owner("open/by-user"), (1000, 1000));
    assert_eq!(owner("roots/by-root"), (33, 44));
}

#[test]
fn a_vmm_without_the_capability_says_so() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            become_the_pod();
            caps::clear(None, CapSet::Effective).unwrap();
            caps::clear(None, CapSet::Permitted).unwrap();
            let mut guest = Guest::new(dir.path());
            let error = guest.kick(REQUESTS).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
            assert!(error.to_string().contains("gid 0"), "{error}");
        });
        served.join().unwrap();
    });
}

#[test]
fn names_do_not_lead_out_of_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::mounted(dir.path());
    let root = guest.lookup(ROOT, "..");
    let inside = fs::metadata(dir.path()).unwrap().ino();
    assert!(root.is_err() || root.unwrap().attr.ino == inside);
    assert!(guest.lookup(ROOT, "../etc").is_err());
    assert!(guest.lookup(ROOT, "/etc").is_err());
}

#[test]
fn malformed_requests_are_returned_and_the_device_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "x").unwrap();
    let mut guest = Guest::mounted(dir.path());
    let header = |opcode: u32, len: u32| {
        [
            &len.to_le_bytes()[..],
            &opcode.to_le_bytes(),
            &7_u64.to_le_bytes(),
            &ROOT.to_le_bytes(),
            &[0; 16],
        ]
        .concat()
    };
    // Shorter than a header; a reply's header does not fit.
    assert!(guest.exchange(&[0; 39], 4096).is_none());
    for opcode in [Opcode::Read, Opcode::Readdir, Opcode::Readdirplus] {
        let request = [header(opcode as u32, 80), vec![0; 40]].concat();
        assert!(guest.exchange(&request, 15).is_none());
    }
    // Lengths that are not so, and no NUL at the end of a name.
    for request in [
        header(1, 0),
        header(1, 4096),
        [header(1, 44), vec![b'a'; 4]].concat(),
    ] {
        let (reply, _) = guest.exchange(&request, 4096).unwrap();
        assert_eq!((reply.error, reply.unique), (-libc::EIO, 7));
    }
    // An unknown operation, one of the DAX window's, too long a message.
    for (opcode, len, error) in [
        (9999, 40, libc::ENOSYS),
        (Opcode::SetupMapping as u32, 40, libc::ENOSYS),
        (1, u32::MAX, libc::ENOMEM),
    ] {
        let (reply, _) = guest.exchange(&header(opcode, len), 4096).unwrap();
        assert_eq!(reply.error, -error);
    }
    // Outside of memory; a loop of descriptors.
    guest.describe(REQUESTS, 0, u64::MAX - 64, 64, NEXT, 1);
    guest.offer(REQUESTS, 0);
    guest.describe(REQUESTS, 2, REQUEST, 8, NEXT, 2);
    guest.offer(REQUESTS, 2);
    guest.kick(REQUESTS).unwrap();
    assert_eq!(guest.used(REQUESTS), guest.next_avail[REQUESTS]);

    assert!(guest.lookup(ROOT, "file").is_ok());
    guest.offer(REQUESTS, 4000);
    assert!(guest.kick(REQUESTS).is_err(), "no such descriptor");
}

#[test]
fn a_flood_of_requests_leaves_the_loop_its_turn_and_is_handled_to_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::mounted(dir.path());
    let before = guest.used(REQUESTS);
    let total = REQUESTS_PER_TURN as u16 + 100;
    // FORGETs of nothing.
    let mut request = vec![0; 48];
    request[0] = 48;
    request[4] = Opcode::Forget as u8;
    guest
        .mem
        .write_slice(&request, GuestAddress(REQUEST))
        .unwrap();
    for index in 0..total {
        guest.describe(REQUESTS, index, REQUEST, 48, 0, 0);
        guest.offer(REQUESTS, index);
    }
    guest.describe(HIPRIO, 0, REQUEST, 48, 0, 0);
    guest.offer(HIPRIO, 0);
    guest.kick(REQUESTS).unwrap();
    assert_eq!(guest.used(REQUESTS) - before, REQUESTS_PER_TURN as u16);

    let mut events = [EpollEvent::empty(); 4];
    assert_eq!(
        guest.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap(),
        1
    );
    let mut io = Io {
        mem: &guest.mem,
        queues: &mut guest.queues,
        irq: &guest.irq,
    };
    guest
        .fs
        .host_ready(events[0].data() as u32, events[0].events(), &mut io)
        .unwrap();
    assert_eq!(guest.used(REQUESTS) - before, total);
    assert_eq!(guest.used(HIPRIO), 1);
    assert_eq!(
        guest.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap(),
        0
    );
}

#[test]
fn the_config_space_is_tag_and_queue_count() {
    let dir = tempfile::tempdir().unwrap();
    let fs = Fs::new(dir.path(), "shared").unwrap();
    let mut config = [0xff; 44];
    fs.read_config(0, &mut config);
    assert_eq!(&config[..7], b"shared\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_root_or_tag_that_cannot_be_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for tag in ["", "a\0b", &"t".repeat(37)] {
        assert!(matches!(Fs::new(dir.path(), tag), Err(FsError::Tag(_))));
    }
    let missing = dir.path().join("missing");
    let error = Fs::new(&missing, "shared").err().unwrap();
    assert!(error.to_string().contains("missing"), "{error}");
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(
        Fs::new(&file, "shared"),
        Err(FsError::Root { .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever a guest sends, nothing panics and every chain comes back.
    #[test]
    fn any_requests_are_survived(
        requests in prop::collection::vec(
            (0u32..60, 0u64..6, prop::collection::vec(0u8..8, 0..120), 0u32..200, any::<bool>()),
            1..40,
        )
    ) {
        let dir = tempfile::tempdir().unwrap();
        // What is allocated, is allocated here.
        let _mount = Tmpfs::mount(dir.path(), "size=256k");
        fs::write(dir.path().join("\u{1}"), "some text").unwrap();
        let mut guest = Guest::mounted(dir.path());
        for (opcode, nodeid, body, room, honest) in requests {
            let len = if honest { 40 + body.len() as u32 } else { room };
            let request = [
                &len.to_le_bytes()[..],
                &opcode.to_le_bytes(),
                &1_u64.to_le_bytes(),
                &nodeid.to_le_bytes(),
                &[0; 16],
                &body,
            ]
            .concat();
            let _ = guest.exchange(&request, room);
        }
    }
}
