//! Requests that break the rules, and too many of them.

use std::fs;

use nix::sys::epoll::{EpollEvent, EpollTimeout};
use proptest::prelude::*;
use virtiofsd::fuse::Opcode;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{Guest, HIPRIO, NEXT, REQUEST, REQUESTS, ROOT};
use super::tmpfs::Tmpfs;
use crate::devices::fs::REQUESTS_PER_TURN;
use crate::devices::{Device, Io};

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
        irq: &guest.irqs,
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
