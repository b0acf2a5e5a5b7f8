//! Names that are no business of the file server's, and what it needs to tell.

use virtiofsd::fuse::{EntryOut, Opcode};

use super::guest::{Guest, ROOT};
use crate::files::{FEWEST_FILES, FileServer};
use crate::refusing::refuse_to_this_thread;

#[test]
fn all_other_names_are_the_file_systems_to_judge() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::mounted(dir.path());
    let longest = [b'x'; 255];
    for name in [&b"..."[..], b"..a", b".a", b" ", b"\n\xff\xfe", &longest] {
        guest
            .call_bytes(Opcode::Mkdir, ROOT, &[&[0; 8], name, b"\0"])
            .unwrap();
        guest
            .call_bytes(Opcode::Rmdir, ROOT, &[name, b"\0"])
            .unwrap();
    }
    let too_long = guest.call_bytes(Opcode::Lookup, ROOT, &[&longest, b"x\0"]);
    assert_eq!(
        too_long.unwrap_err().raw_os_error(),
        Some(libc::ENAMETOOLONG)
    );

    // A link may say what it likes: it is the guest's kernel that follows it.
    let target = b"../../etc/passwd";
    let link: EntryOut = guest
        .call(Opcode::Symlink, ROOT, &[b"link\0", target, b"\0"])
        .unwrap();
    let said = guest.call_bytes(Opcode::Readlink, link.nodeid, &[]);
    assert_eq!(said.unwrap(), target);
}

#[test]
fn without_openat2_nothing_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let error = std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            refuse_to_this_thread(libc::SYS_openat2, libc::ENOSYS);
            FileServer::new(dir.path(), None, None, FEWEST_FILES)
                .err()
                .unwrap()
        });
        served.join().unwrap()
    });
    let text = crate::supervisor::chain(&error);
    assert!(text.contains("openat2 (Linux 5.6)"), "{text}");
}
