//! Whole trees: the mounted image against GNU tar's extraction.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use proptest::prelude::*;
use tempfile::TempDir;

use super::support::{assert_like_gnu_tar, bytes, run};

/// Packs `dir` by GNU tar; `extra` begins with the format.
fn pack(dir: &Path, extra: &[&str]) -> (TempDir, PathBuf) {
    let out = TempDir::new().unwrap();
    let archive = out.path().join("archive.tar");
    // GNU's own format has no place for xattrs.
    let xattrs: &[&str] = if extra[0] == "--format=gnu" {
        &[]
    } else {
        &["--xattrs", "--xattrs-include=*"]
    };
    run(Command::new("tar")
        .args(xattrs)
        .arg("--numeric-owner")
        .args(extra)
        .arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(dir)
        .arg("."));
    (out, archive)
}

fn write(path: PathBuf, content: &[u8]) -> PathBuf {
    fs::write(&path, content).unwrap();
    path
}

fn odd_names(root: &Path) {
    use std::os::unix::ffi::OsStrExt;
    let names: [&[u8]; 14] = [
        b"new\nline",
        b" leading and trailing ",
        "\u{fc}ml\u{e4}ut-\u{6f22}\u{5b57}".as_bytes(),
        b"\xff\xfe not utf-8",
        b"-dash",
        b"!bang",
        b"...",
        b".hidden",
        b"back\\slash",
        b"tab\there",
        b"\x01",
        b"+",
        b"\x7f",
        b"~",
    ];
    for (number, name) in names.iter().enumerate() {
        let path = root.join(std::ffi::OsStr::from_bytes(name));
        write(path, format!("{number}").as_bytes());
    }
    write(root.join("n".repeat(255)), b"longest");
    let mut deep = root.to_path_buf();
    for level in 0..60 {
        deep.push(format!("level-{level}-{}", "x".repeat(20)));
        fs::create_dir(&deep).unwrap();
    }
    write(deep.join("bottom"), b"down here");
}

fn special_files(root: &Path) {
    let node = |name: &str, kind, mode, device| {
        let path = root.join(name);
        mknod(&path, kind, Mode::from_bits_truncate(mode), device).unwrap();
        // mknod heeds the umask.
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    node("null", SFlag::S_IFCHR, 0o666, makedev(1, 3));
    node("disk", SFlag::S_IFBLK, 0o660, makedev(259, 70_000));
    node("fifo", SFlag::S_IFIFO, 0o600, 0);
    for (name, mode) in [
        ("setuid", 0o4755),
        ("setgid", 0o2755),
        ("none", 0),
        ("sticky", 0o1644),
    ] {
        let path = write(root.join(name), b"#!");
        chown(&path, Some(1000), Some(100_000)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::create_dir(root.join("tmp")).unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    symlink("none", root.join("link")).unwrap();
    symlink("t/".repeat(1500), root.join("long-link")).unwrap();
    symlink("/nowhere/at/all", root.join("dangling")).unwrap();
    std::os::unix::fs::lchown(root.join("link"), Some(5), Some(6)).unwrap();
    fs::create_dir(root.join("links")).unwrap();
    for number in 0..200 {
        fs::hard_link(root.join("setuid"), root.join(format!("links/{number}"))).unwrap();
    }
    fs::hard_link(root.join("dangling"), root.join("links/dangling")).unwrap();
}

fn xattrs(root: &Path) {
    let path = write(root.join("capable"), b"binary");
    // cap_net_raw=ep, revision 2.
    let mut capability = [0u8; 20];
    capability[..4].copy_from_slice(&0x0200_0001u32.to_le_bytes());
    capability[4..8].copy_from_slice(&(1u32 << 13).to_le_bytes());
    xattr::set(&path, "security.capability", &capability).unwrap();
    xattr::set(&path, "user.text", b"value").unwrap();
    xattr::set(&path, "user.binary", b"\0\n=\xff").unwrap();
    xattr::set(&path, "trusted.t", b"1").unwrap();
    let dir = root.join("with-acl");
    fs::create_dir(&dir).unwrap();
    xattr::set(&dir, "user.on-a-directory", &[b'd'; 3000]).unwrap();
    write(dir.join("x"), b"");
}

fn contents(root: &Path) {
    for size in [
        0usize, 1, 511, 512, 2047, 2048, 2049, 4095, 4096, 4097, 6144, 6145, 70_000, 262_145,
    ] {
        let content: Vec<u8> = (0..size).map(|at| (at * 7 + at / 251) as u8 | 1).collect();
        write(root.join(format!("size-{size}")), &content);
        write(root.join(format!("zeros-{size}")), &vec![0; size]);
    }
    for (number, holes) in [
        &[(0u64, 10u64)][..],
        &[(65_536, 1), (1 << 20, 4096), ((1 << 20) + 70_000, 3)],
        &[(131_071, 2), (400_000, 100_000)],
    ]
    .iter()
    .enumerate()
    {
        let mut file = File::create(root.join(format!("sparse-{number}"))).unwrap();
        for (at, len) in holes.iter() {
            file.seek(SeekFrom::Start(*at)).unwrap();
            file.write_all(&vec![b'x'; *len as usize]).unwrap();
        }
        file.set_len((2 << 20) + 1000 * number as u64).unwrap();
    }
}

#[test]
fn a_nasty_tree_is_the_same_in_every_format() {
    let root = TempDir::new().unwrap();
    let part = |name: &str| {
        let path = root.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    odd_names(&part("names"));
    special_files(&part("special"));
    xattrs(&part("xattrs"));
    contents(&part("contents"));
    for extra in [
        &["--format=pax"][..],
        &["--format=gnu"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0"],
        &["--format=gnu", "--sparse", "--hole-detection=raw"],
    ] {
        let (_out, archive) = pack(root.path(), extra);
        assert_like_gnu_tar(&archive);
    }
}

#[test]
fn a_sparse_gigabyte_takes_what_its_data_takes() {
    let root = TempDir::new().unwrap();
    let mut file = File::create(root.path().join("sparse")).unwrap();
    for at in [0u64, 300 << 20, (1 << 30) - 5] {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(b"data!").unwrap();
    }
    drop(file);
    let (_out, archive) = pack(root.path(), &["--format=pax", "--sparse"]);
    let image = super::support::image_of(&fs::read(&archive).unwrap())
        .unwrap()
        .0;
    assert!(image.len() < 1 << 20, "{}", image.len());
    assert_like_gnu_tar(&archive);
    // As other archivers store it: zeros and all.
    let file = File::options()
        .write(true)
        .open(root.path().join("sparse"))
        .unwrap();
    file.set_len(64 << 20).unwrap();
    let (_out, archive) = pack(root.path(), &["--format=pax"]);
    let image = super::support::image_of(&fs::read(&archive).unwrap())
        .unwrap()
        .0;
    assert!(image.len() < 1 << 20, "{}", image.len());
}

#[test]
fn a_directory_of_a_hundred_thousand_files() {
    let root = TempDir::new().unwrap();
    let dir = root.path().join("many");
    fs::create_dir(&dir).unwrap();
    for number in 0..100_000u32 {
        let name = format!(
            "{:x}-{}",
            number.wrapping_mul(2_654_435_761),
            "n".repeat(number as usize % 40)
        );
        write(dir.join(name), &vec![b'c'; number as usize % 60]);
    }
    let (_out, archive) = pack(root.path(), &["--format=pax"]);
    assert_like_gnu_tar(&archive);
}

#[test]
fn a_tree_that_debian_ships() {
    let archive = TempDir::new().unwrap();
    let path = archive.path().join("usr.tar");
    // Parents before and beside their children, or GNU tar does not restore
    // their times.
    let (one, all) = ("--no-recursion", "--recursion");
    run(Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*"])
        .args(["--numeric-owner", "--format=pax", "-cf"])
        .arg(&path)
        .args(["-C", "/", one, ".", all, "etc", one, "usr", all, "usr/sbin"])
        .args([
            one,
            "usr/lib",
            all,
            "usr/lib/python3",
            one,
            "usr/share",
            all,
        ])
        .args(["usr/share/perl5", "usr/share/zoneinfo"]));
    assert_like_gnu_tar(&path);
}

#[test]
fn the_same_archive_gives_the_same_bytes() {
    let root = TempDir::new().unwrap();
    for number in 0..500 {
        write(
            root.path().join(format!("f{number}")),
            &vec![1; number * 13],
        );
    }
    contents(root.path());
    xattrs(root.path());
    let (_out, archive) = pack(root.path(), &["--format=pax"]);
    let tar = fs::read(archive).unwrap();
    let first = super::support::image_of(&tar).unwrap();
    for _ in 0..3 {
        assert!(first == super::support::image_of(&tar).unwrap());
    }
}

/// A thing to put into a tree.
#[derive(Clone, Debug)]
enum Make {
    Dir,
    File(Vec<(u32, u8)>),
    Symlink(String),
    Link(prop::sample::Index),
    Fifo,
}

#[derive(Clone, Debug)]
struct Thing {
    parent: prop::sample::Index,
    name: Vec<u8>,
    make: Make,
    mode: u32,
    owner: (u32, u32),
    mtime: (i32, u32),
    xattr: Option<(String, Vec<u8>)>,
}

fn thing() -> impl Strategy<Value = Thing> {
    let name = proptest::collection::vec(
        any::<u8>().prop_filter("no name", |byte| *byte != 0 && *byte != b'/'),
        1..40,
    )
    .prop_filter("a name with a meaning", |name| {
        name != b"." && name != b".." && !name.starts_with(b".wh.")
    });
    let make = prop_oneof![
        3 => Just(Make::Dir),
        4 => proptest::collection::vec((0u32..90_000, any::<u8>()), 0..4).prop_map(Make::File),
        1 => "[a-z/.]{1,300}".prop_map(Make::Symlink),
        1 => any::<prop::sample::Index>().prop_map(Make::Link),
        1 => Just(Make::Fifo),
    ];
    let xattr = proptest::option::of((
        "[a-z.]{1,20}",
        proptest::collection::vec(any::<u8>(), 0..200),
    ));
    (
        any::<prop::sample::Index>(),
        name,
        make,
        0u32..0o7777,
        (0u32..200_000, any::<u16>().prop_map(u32::from)),
        (any::<i32>(), 0u32..1_000_000_000),
        xattr,
    )
        .prop_map(|(parent, name, make, mode, owner, mtime, xattr)| Thing {
            parent,
            name,
            make,
            mode,
            owner,
            mtime,
            xattr,
        })
}

fn build(root: &Path, things: &[Thing]) {
    use std::os::unix::ffi::OsStrExt;
    let mut dirs = vec![root.to_path_buf()];
    let mut files: Vec<PathBuf> = Vec::new();
    let mut all = Vec::new();
    for thing in things {
        let path = thing
            .parent
            .get(&dirs)
            .join(std::ffi::OsStr::from_bytes(&thing.name));
        if bytes(&path).len() > 3000 || path.symlink_metadata().is_ok() {
            continue;
        }
        match &thing.make {
            Make::Dir => {
                fs::create_dir(&path).unwrap();
                dirs.push(path.clone());
            }
            Make::File(runs) => {
                let content: Vec<u8> = runs
                    .iter()
                    .flat_map(|(len, byte)| vec![*byte; *len as usize])
                    .collect();
                write(path.clone(), &content);
                files.push(path.clone());
            }
            Make::Symlink(target) => symlink(target, &path).unwrap(),
            Make::Link(_) if files.is_empty() => continue,
            Make::Link(index) => {
                fs::hard_link(index.get(&files), &path).unwrap();
                continue;
            }
            Make::Fifo => mknod(&path, SFlag::S_IFIFO, Mode::empty(), 0).unwrap(),
        }
        all.push((path, thing));
    }
    for (path, thing) in all {
        std::os::unix::fs::lchown(&path, Some(thing.owner.0), Some(thing.owner.1)).unwrap();
        let is_link = path.is_symlink();
        if let Some((name, value)) = &thing.xattr
            && matches!(thing.make, Make::Dir | Make::File(_))
            && !value.is_empty()
        {
            xattr::set(&path, format!("user.{name}"), value).unwrap();
        }
        if !is_link {
            fs::set_permissions(&path, fs::Permissions::from_mode(thing.mode)).unwrap();
        }
        let time = nix::sys::time::TimeSpec::new(thing.mtime.0.into(), thing.mtime.1.into());
        nix::sys::stat::utimensat(
            nix::fcntl::AT_FDCWD,
            &path,
            &time,
            &time,
            nix::sys::stat::UtimensatFlags::NoFollowSymlink,
        )
        .unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(32) })]

    #[test]
    fn any_tree_is_the_same(things in proptest::collection::vec(thing(), 0..80), sparse in any::<bool>()) {
        let root = TempDir::new().unwrap();
        build(root.path(), &things);
        let extra: &[&str] = if sparse { &["--format=pax", "--sparse", "--hole-detection=raw"] } else { &["--format=pax"] };
        let (_out, archive) = pack(root.path(), extra);
        assert_like_gnu_tar(&archive);
    }
}
