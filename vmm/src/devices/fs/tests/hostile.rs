//! Requests that break the rules, and too many of them.

use std::fs;
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::epoll::{EpollEvent, EpollTimeout};
use proptest::prelude::*;
use virtiofsd::fuse::Opcode;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{Guest, HIPRIO, NEXT, REQUEST, REQUESTS, ROOT, WRITE};
use super::tmpfs::Tmpfs;
use crate::devices::fs::{MAX_ASKED, REQUESTS_PER_TURN};
use crate::files::channel::Asked;

fn header(opcode: u32, len: u32) -> Vec<u8> {
    [
        &len.to_le_bytes()[..],
        &opcode.to_le_bytes(),
        &7_u64.to_le_bytes(),
        &ROOT.to_le_bytes(),
        &[0; 16],
    ]
    .concat()
}

#[test]
fn malformed_requests_are_returned_and_the_device_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "x").unwrap();
    let mut guest = Guest::mounted(dir.path());
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
    guest.settle();

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

    guest.settle();
    assert_eq!(guest.used(REQUESTS) - before, total);
    assert_eq!(guest.used(HIPRIO), 1);
    let mut events = [EpollEvent::empty(); 4];
    assert_eq!(
        guest.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap(),
        0
    );
}

/// More than the queue holds: the guest offers one chain again and again.
#[test]
fn what_the_file_server_is_asked_at_once_is_bounded() {
    let (channel, files) = crate::files::channel::pair().unwrap();
    let mut guest = Guest::new(channel);
    let request = header(Opcode::Statfs as u32, 40);
    guest
        .mem
        .write_slice(&request, GuestAddress(REQUEST))
        .unwrap();
    guest.describe(REQUESTS, 0, REQUEST, 40, NEXT, 1);
    guest.describe(REQUESTS, 1, REQUEST + 4096, 4096, WRITE, 0);
    let mut asked = Asked::default();
    for _ in 0..20 {
        for _ in 0..100 {
            guest.offer(REQUESTS, 0);
        }
        guest.kick(REQUESTS).unwrap();
        // A server that takes what it is asked and never answers.
        while nix::poll::poll(
            &mut [PollFd::new(files.as_fd(), PollFlags::POLLIN)],
            PollTimeout::ZERO,
        )
        .unwrap()
            > 0
        {
            assert!(asked.receive(&files).unwrap());
        }
        if guest.fs.asked.len() < MAX_ASKED && guest.fs.unsent.is_some() {
            guest.turn().unwrap();
        }
        assert!(guest.fs.asked.len() <= MAX_ASKED);
    }
    assert_eq!(guest.fs.asked.len(), MAX_ASKED);
    // It ends: so does the device.
    drop(files);
    let error = guest.turn().unwrap_err();
    assert!(
        error.to_string().contains("the file server is gone"),
        "{error}"
    );
}

/// Every operation that has a name, with names that lead elsewhere. Beside the
/// directory lies what must stay as it is.
#[test]
fn no_name_leads_out_of_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (shared, beside) = (dir.path().join("shared"), dir.path().join("beside"));
    for path in [&shared, &beside] {
        fs::create_dir(path).unwrap();
        fs::write(path.join("file"), "kept").unwrap();
        fs::create_dir(path.join("dir")).unwrap();
    }
    let mut guest = Guest::mounted(&shared);
    let file = guest.lookup(ROOT, "file").unwrap().nodeid;
    let new = |name: &str| beside.join(name).to_str().unwrap().to_owned();
    let names = [
        "../beside/file".to_owned(),
        "../beside/dir".to_owned(),
        "../beside/new".to_owned(),
        new("new"),
        new("file"),
        new("dir"),
        "./file".to_owned(),
        "..".to_owned(),
        ".".to_owned(),
        "/".to_owned(),
        String::new(),
    ];
    let mknod = |mode: u32, rdev: u32| [mode, rdev, 0, 0].map(u32::to_le_bytes).concat();
    let two = |flags: u32| [&ROOT.to_le_bytes()[..], &u64::from(flags).to_le_bytes()].concat();
    for name in &names {
        let name = [name.as_bytes(), b"\0"].concat();
        let tries: Vec<(Opcode, Vec<u8>)> = vec![
            (Opcode::Lookup, name.clone()),
            (Opcode::Symlink, [&name[..], b"target\0"].concat()),
            (
                Opcode::Mknod,
                [&mknod(libc::S_IFREG | 0o644, 0)[..], &name].concat(),
            ),
            (
                Opcode::Mkdir,
                [&[0xff, 1, 0, 0, 0, 0, 0, 0][..], &name].concat(),
            ),
            (Opcode::Unlink, name.clone()),
            (Opcode::Rmdir, name.clone()),
            (
                Opcode::Rename,
                [&ROOT.to_le_bytes()[..], b"file\0", &name].concat(),
            ),
            (
                Opcode::Rename,
                [&ROOT.to_le_bytes()[..], &name, b"taken\0"].concat(),
            ),
            (Opcode::Rename2, [&two(0)[..], b"file\0", &name].concat()),
            (
                Opcode::Rename2,
                [&two(libc::RENAME_EXCHANGE)[..], &name, b"file\0"].concat(),
            ),
            (Opcode::Link, [&file.to_le_bytes()[..], &name].concat()),
        ];
        for (opcode, body) in tries {
            let outcome = guest.call_bytes(opcode, ROOT, &[&body]);
            let error = outcome.expect_err(&format!("{opcode:?} of {name:?}"));
            let errno = error.raw_os_error();
            assert!(
                errno == Some(libc::EINVAL) || errno == Some(libc::ENOENT),
                "{opcode:?} of {name:?}: {error}"
            );
        }
        let name = std::str::from_utf8(&name[..name.len() - 1]).unwrap();
        assert!(guest.create(ROOT, name).is_err(), "{name}");
    }
    for path in [&shared, &beside] {
        assert_eq!(fs::read(path.join("file")).unwrap(), b"kept");
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["dir", "file"]);
    }
}

#[test]
fn a_guest_makes_no_device_of_the_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::mounted(dir.path());
    let mut make = |name: &str, mode: u32, rdev: u32| {
        let body = [mode | 0o666, rdev, 0, 0].map(u32::to_le_bytes).concat();
        let name = [name.as_bytes(), b"\0"].concat();
        guest
            .call_bytes(Opcode::Mknod, ROOT, &[&body, &name])
            .map_err(|error| error.raw_os_error().unwrap())
    };
    assert_eq!(make("null", libc::S_IFCHR, 0x103), Err(libc::EPERM));
    assert_eq!(make("disk", libc::S_IFBLK, 0x800), Err(libc::EPERM));
    for (name, mode) in [
        ("whiteout", libc::S_IFCHR),
        ("fifo", libc::S_IFIFO),
        ("socket", libc::S_IFSOCK),
        ("file", libc::S_IFREG),
    ] {
        make(name, mode, 0).unwrap();
    }
    assert!(!dir.path().join("null").exists() && !dir.path().join("disk").exists());
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
