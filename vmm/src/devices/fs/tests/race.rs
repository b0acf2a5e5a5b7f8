//! Another processor of the guest changes a request while it is served.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use virtiofsd::fuse::{InHeader, MkdirIn, Opcode, ReadIn};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::guest::{Guest, NEXT, REPLY, REQUEST, REQUESTS, ROOT, WRITE, descriptor_place};
use crate::devices::hostile::Canary;

/// Requests of a test: enough for what is fetched twice to be caught many
/// times.
const ROUNDS: usize = 30_000;

/// Writes one and the other over and over at `place` while `work` runs.
fn flickering(mem: &GuestMemoryMmap, place: u64, [one, other]: [&[u8]; 2], work: impl FnOnce()) {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                mem.write_slice(one, GuestAddress(place)).unwrap();
                mem.write_slice(other, GuestAddress(place)).unwrap();
            }
        });
        let _over = Over(&over);
        work();
    });
}

fn header(opcode: Opcode, nodeid: u64, body: usize) -> InHeader {
    InHeader {
        len: (size_of::<InHeader>() + body) as u32,
        opcode: opcode as u32,
        unique: 1,
        nodeid,
        ..InHeader::default()
    }
}

/// Puts a request up, whose reply goes into the second descriptor.
fn put(guest: &mut Guest, request: &[u8], room: u32) {
    guest
        .mem
        .write_slice(request, GuestAddress(REQUEST))
        .unwrap();
    guest.describe(REQUESTS, 0, REQUEST, request.len() as u32, NEXT, 1);
    guest.describe(REQUESTS, 1, REPLY, room, WRITE, 0);
}

fn serve(guest: &mut Guest) {
    guest.offer(REQUESTS, 0);
    guest.kick(REQUESTS).unwrap();
    guest.settle();
}

#[test]
fn room_for_a_reply_that_shrinks_meanwhile_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "text").unwrap();
    let mut guest = Guest::mounted(dir.path());
    let file = guest.lookup(ROOT, "file").unwrap().nodeid;
    let read = ReadIn {
        size: 4096,
        ..ReadIn::default()
    };
    let header = header(Opcode::Read, file, size_of::<ReadIn>());
    put(
        &mut guest,
        &[header.as_slice(), read.as_slice()].concat(),
        4096,
    );
    // The length in the second descriptor.
    let place = descriptor_place(REQUESTS, 1) + 8;
    let lens = [4096_u32.to_le_bytes(), 8_u32.to_le_bytes()];
    let mem = guest.mem.clone();
    flickering(&mem, place, [&lens[0], &lens[1]], || {
        for _ in 0..ROUNDS {
            serve(&mut guest);
        }
    });
}

#[test]
fn a_name_that_changes_meanwhile_leads_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let canary = Canary::new(dir.path()).unwrap();
    let mut guest = Guest::mounted(&canary.share());
    let mkdir = MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    let body = [mkdir.as_slice(), b"in_new\0"].concat();
    let header = header(Opcode::Mkdir, ROOT, body.len());
    put(&mut guest, &[header.as_slice(), &body].concat(), 4096);
    let place = REQUEST + (size_of::<InHeader>() + size_of::<MkdirIn>()) as u64;
    let mem = guest.mem.clone();
    let inside = canary.share().join("in_new");
    let mut made = 0;
    flickering(&mem, place, [b"in_", b"../"], || {
        for _ in 0..ROUNDS {
            serve(&mut guest);
            made += usize::from(fs::remove_dir(&inside).is_ok());
        }
    });
    canary.assert_unharmed().unwrap();
    assert!(made > 0, "the name was never a good one");
}
