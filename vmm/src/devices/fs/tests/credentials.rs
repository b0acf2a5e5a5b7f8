//! Whose files are, and what the file server needs for that.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use caps::CapSet;
use virtiofsd::fuse::{AttrOut, Opcode, SetattrIn};
use virtiofsd::soft_idmap::{GuestGid, GuestUid};
use vm_memory::ByteValued;
use vmm_client::IdRange;

use super::guest::{Guest, ROOT};
use crate::files::{NOBODY, on_thread};
use crate::jail::OF_FILE_SERVER;

/// A uid that a pod might have.
const POD: libc::c_long = 777_777;

/// Makes the calling thread what the jail makes of the file server: a few
/// capabilities, and root's ids but for the real ones.
fn become_the_file_server() {
    let kept = OF_FILE_SERVER.into_iter().collect();
    let none: *const libc::gid_t = std::ptr::null();
    // SAFETY: system calls on ids of this thread; an empty list of groups.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_setgroups, 0, none), 0);
        assert_eq!(libc::syscall(libc::SYS_setresgid, POD, 0, 0), 0);
        assert_eq!(libc::syscall(libc::SYS_setresuid, POD, 0, 0), 0);
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
    {
        let files = on_thread::start(path, None, become_the_file_server).unwrap();
        let mut guest = Guest::mounted_from(files);
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
        let chown = SetattrIn {
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
    }
    assert_eq!(owner("open/by-root"), (0, 0));
    assert_eq!(owner("open/by-user"), (1000, 1000));
    assert_eq!(owner("roots/by-root"), (33, 44));
}

#[test]
fn ids_are_the_guests_on_one_side_and_the_hosts_on_the_other() {
    const FIRST: u32 = 100_000;
    let ids = IdRange {
        guest: FIRST,
        length: 1000,
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    for (name, owner) in [
        ("five", 5),
        ("last", 999),
        ("beyond", 1000),
        ("mapped", FIRST),
    ] {
        fs::write(path.join(name), "").unwrap();
        chown(path.join(name), Some(owner), Some(owner)).unwrap();
    }
    {
        let files = on_thread::start(path, Some(ids), become_the_file_server).unwrap();
        let mut guest = Guest::mounted_from(files);
        for (name, uid) in [
            ("five", FIRST + 5),
            ("last", FIRST + 999),
            ("beyond", NOBODY),
            ("mapped", NOBODY),
        ] {
            let attr = guest.lookup(ROOT, name).unwrap().attr;
            let seen = (attr.uid, attr.gid);
            assert_eq!(seen, (GuestUid::from(uid), GuestGid::from(uid)), "{name}");
        }
        guest.uid = FIRST;
        let (file, _) = guest.create(ROOT, "by-root").unwrap();
        guest.uid = FIRST + 7;
        guest.create(ROOT, "by-user").unwrap();
        let chown = SetattrIn {
            valid: 0b110,
            uid: GuestUid::from(FIRST + 33),
            gid: GuestGid::from(FIRST + 44),
            ..Default::default()
        };
        let out: AttrOut = guest
            .call(Opcode::Setattr, file.nodeid, &[chown.as_slice()])
            .unwrap();
        assert_eq!(out.attr.uid, GuestUid::from(FIRST + 33));
    }
    let owner = |name: &str| {
        let file = fs::metadata(path.join(name)).unwrap();
        (file.uid(), file.gid())
    };
    assert_eq!(owner("by-root"), (33, 44));
    assert_eq!(owner("by-user"), (7, 7));
}
