//! Files of the host in the guest and the other way round.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::sync::atomic::Ordering;

use virtiofsd::fuse::{ATTR_SUBMOUNT, Opcode};

use super::guest::{Guest, ROOT};
use super::tmpfs::Tmpfs;

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
    assert!(guest.irqs.used.load(Ordering::Relaxed) > 0);
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
