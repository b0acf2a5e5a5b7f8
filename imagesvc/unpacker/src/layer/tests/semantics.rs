//! What the members of a layer mean.

use super::support::{Mounted, Overlay, Tar, error_of, image_of};

#[test]
fn a_later_member_replaces_an_earlier_one() {
    let mut tar = Tar::default();
    tar.file("a", b"old").file("a", b"new");
    tar.dir("d")
        .file("d/kept", b"k")
        .member_with(b'5', b"d/", b"", b"", |header| {
            header.set_mode(0o1777);
            header.set_uid(7);
        });
    tar.dir("gone")
        .file("gone/x", b"x")
        .file("gone", b"a file now");
    tar.symlink("s", "a")
        .dir("s")
        .file("s/x", b"in a directory");
    tar.file("f", b"1").hard_link("g", "f").file("f", b"2");
    let root = Mounted::tar(&tar.finish());
    assert_eq!(root.names(""), ["a", "d", "f", "g", "gone", "s"]);
    assert_eq!(root.read("a"), b"new");
    assert_eq!(root.read("d/kept"), b"k");
    assert_eq!((root.stat("d").mode, root.stat("d").uid), (0o41777, 7));
    assert_eq!(root.read("gone"), b"a file now");
    assert_eq!(root.read("s/x"), b"in a directory");
    assert_eq!(
        (root.read("f"), root.read("g")),
        (b"2".to_vec(), b"1".to_vec())
    );
    assert_eq!((root.stat("f").nlink, root.stat("g").nlink), (1, 1));
}

#[test]
fn missing_parents_are_made_for_root() {
    let mut tar = Tar::default();
    tar.file("/a/./b//c", b"x").file("././e", b"y");
    let root = Mounted::tar(&tar.finish());
    for path in ["", "a", "a/b"] {
        let stat = root.stat(path);
        assert_eq!(
            (stat.mode, stat.uid, stat.gid, stat.mtime),
            (0o40755, 0, 0, (0, 0))
        );
    }
    assert_eq!(root.stat("").nlink, 3);
    assert_eq!(root.read("a/b/c"), b"x");
    assert_eq!(root.read("e"), b"y");
}

#[test]
fn the_root_takes_attributes_and_is_a_directory() {
    let mut tar = Tar::default();
    tar.file("a", b"");
    tar.member_with(b'5', b"./", b"", b"", |header| header.set_mode(0o700));
    assert_eq!(Mounted::tar(&tar.finish()).stat("").mode, 0o40700);
    let mut tar = Tar::default();
    tar.symlink("./", "elsewhere");
    assert_eq!(
        error_of(&tar),
        "entry './' of the layer: it is the root but no directory"
    );
}

#[test]
fn whiteouts_become_what_overlayfs_reads() {
    let mut tar = Tar::default();
    tar.file("d/.wh.hidden", b"")
        .file("o/.wh..wh..opq", b"")
        .file("o/x", b"");
    tar.file(".wh..wh.plnk/1.2", b"")
        .file("d/.wh..wh.aufs", b"");
    let (image, converted) = image_of(&tar.finish()).unwrap();
    let root = Mounted::image(&image);
    assert_eq!(root.names(""), ["d", "o"]);
    assert_eq!(root.names("d"), ["hidden"]);
    assert!(root.stat("d/hidden").is_whiteout());
    assert!(root.stat("o").is_opaque());
    assert!(!root.stat("d").is_opaque());
    assert_eq!(root.names("o"), ["x"]);
    assert!(!converted.opaque_root);
    assert_eq!(converted.entries, 5);
}

#[test]
fn stacked_by_overlayfs_layers_are_what_the_image_means() {
    let mut base = Tar::default();
    base.file("etc/gone", b"")
        .file("etc/kept", b"lower")
        .file("etc/new", b"lower");
    base.file("emptied/a", b"")
        .file("emptied/b", b"")
        .file("remade/a", b"");
    base.file("merged/a", b"lower")
        .symlink("kind", "etc")
        .file("linked", b"lower");
    let mut layer = Tar::default();
    layer
        .file("etc/.wh.gone", b"")
        .file("etc/new", b"upper")
        .file("emptied/.wh..wh..opq", b"");
    layer
        .file("emptied/c", b"")
        .file(".wh.remade", b"")
        .dir("remade")
        .file("remade/z", b"");
    layer
        .file("merged/b", b"upper")
        .file("kind/x", b"")
        .hard_link("linked", "etc/new");
    let overlay = Overlay::of(&[&layer.finish(), &base.finish()]);
    assert_eq!(
        overlay.names(""),
        ["emptied", "etc", "kind", "linked", "merged", "remade"]
    );
    assert_eq!(overlay.names("etc"), ["kept", "new"]);
    assert_eq!(overlay.names("emptied"), ["c"]);
    assert_eq!(overlay.names("remade"), ["z"]);
    assert_eq!(overlay.names("merged"), ["a", "b"]);
    assert_eq!(overlay.names("kind"), ["x"]);
    assert_eq!(overlay.read("etc/new"), b"upper");
    assert_eq!(overlay.read("linked"), b"upper");
    assert_eq!(overlay.read("etc/kept"), b"lower");
}

#[test]
fn a_whiteout_never_hides_what_its_own_layer_has() {
    let mut tar = Tar::default();
    tar.file(".wh.file", b"").file("file", b"1");
    tar.file("late", b"2").file(".wh.late", b"");
    tar.file(".wh.dir", b"").dir("dir").file("dir/x", b"");
    tar.dir("latedir")
        .file("latedir/x", b"")
        .file(".wh.latedir", b"");
    tar.file(".wh.implied", b"").file("implied/x", b"");
    let root = Mounted::tar(&tar.finish());
    assert_eq!(
        root.names(""),
        ["dir", "file", "implied", "late", "latedir"]
    );
    assert_eq!(root.read("file"), b"1");
    assert_eq!(root.read("late"), b"2");
    for path in ["dir", "latedir", "implied"] {
        assert!(root.stat(path).is_opaque(), "{path}");
        assert_eq!(root.names(path), ["x"]);
    }
}

#[test]
fn an_opaque_mark_outlives_the_directorys_own_entry() {
    let mut tar = Tar::default();
    tar.file("d/.wh..wh..opq", b"")
        .dir("d")
        .file(".wh..wh..opq", b"");
    let (image, converted) = image_of(&tar.finish()).unwrap();
    let root = Mounted::image(&image);
    assert!(root.stat("d").is_opaque());
    assert!(converted.opaque_root);
}

#[test]
fn overlays_own_attributes_are_not_taken_over() {
    let mut tar = Tar::default();
    tar.pax(&[
        (b"SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        (b"SCHILY.xattr.trusted.overlay.opaque", b"y"),
        (b"SCHILY.xattr.trusted.other", b"1"),
        (b"SCHILY.xattr.com.apple.quarantine", b"1"),
        (b"SCHILY.xattr.user.binary", b"a\nb\0=c"),
    ]);
    tar.dir("d");
    let (image, converted) = image_of(&tar.finish()).unwrap();
    let root = Mounted::image(&image);
    let stat = root.stat("d");
    assert_eq!(stat.xattrs.len(), 2);
    assert_eq!(stat.xattr("trusted.other"), Some(&b"1"[..]));
    assert_eq!(stat.xattr("user.binary"), Some(&b"a\nb\0=c"[..]));
    assert_eq!(converted.dropped_xattrs, 3);
}

#[test]
fn hard_links_share_an_inode() {
    let mut tar = Tar::default();
    tar.member_with(b'0', b"a/file", b"", b"x", |header| header.set_mode(0o4755));
    tar.hard_link("b", "/a/file")
        .hard_link("c", "./b")
        .hard_link("b", "b");
    tar.symlink("s", "b").hard_link("t", "s");
    let root = Mounted::tar(&tar.finish());
    let file = super::support::snapshot(&root.path());
    let first = |path: &str| file[std::path::Path::new(path)].first.clone();
    assert_eq!(first("b"), first("a/file"));
    assert_eq!(first("c"), first("a/file"));
    assert_eq!((root.stat("c").nlink, root.stat("c").mode), (3, 0o104_755));
    assert_eq!(first("t"), first("s"));
    assert_eq!(root.stat("t").nlink, 2);
}

#[test]
fn hard_links_to_nothing_name_both_ends() {
    let cases = [
        ("missing", "'missing', which is not in this layer"),
        ("d/e/f", "'d/e/f', which is not in this layer"),
        ("hidden", "'hidden', which is not in this layer"),
        ("d", "'d', which is a directory"),
        ("/", "'/', which is a directory"),
        ("../x", "'../x', which points outside the root"),
        ("", "'', which is no valid path"),
    ];
    for (target, text) in cases {
        let mut tar = Tar::default();
        tar.dir("d").file(".wh.hidden", b"").hard_link("l", target);
        assert_eq!(
            error_of(&tar),
            format!("entry 'l' of the layer: it is a hard link to {text}")
        );
    }
}

#[test]
fn a_path_outside_the_root_is_refused() {
    for path in [
        "../etc/passwd",
        "a/../../b",
        "/..",
        "a/..",
        ".wh...",
        "d/.wh...",
    ] {
        let mut tar = Tar::default();
        tar.file(path, b"");
        assert_eq!(
            error_of(&tar),
            format!("entry '{path}' of the layer: its path points outside the root")
        );
    }
}

#[test]
fn a_path_through_a_symlink_stays_in_the_tree() {
    let mut tar = Tar::default();
    tar.dir("usr/lib")
        .symlink("lib", "usr/lib")
        .file("lib/a", b"1");
    tar.symlink("out", "../../../../etc").file("out/b", b"2");
    tar.symlink("abs", "/usr/./new").file("abs/c", b"3");
    tar.symlink("usr/up", "..").file("usr/up/d", b"4");
    tar.hard_link("e", "lib/a");
    let root = Mounted::tar(&tar.finish());
    assert_eq!(
        root.names(""),
        ["abs", "d", "e", "etc", "lib", "out", "usr"]
    );
    assert_eq!(root.read("usr/lib/a"), b"1");
    assert_eq!(root.read("etc/b"), b"2");
    assert_eq!(root.read("usr/new/c"), b"3");
    assert_eq!(root.read("d"), b"4");
    assert_eq!(root.read("e"), b"1");
    assert_eq!(root.stat("lib").link.unwrap().to_str(), Some("usr/lib"));
}

#[test]
fn a_path_through_anything_else_is_refused() {
    let mut tar = Tar::default();
    tar.symlink("a", "b").symlink("b", "a").file("a/x", b"");
    assert_eq!(
        error_of(&tar),
        "entry 'a/x' of the layer: its path goes through more than 40 symbolic links"
    );
    let mut tar = Tar::default();
    tar.file("f", b"").file("f/x", b"");
    assert_eq!(
        error_of(&tar),
        "entry 'f/x' of the layer: its path goes through 'f', which is no directory"
    );
    let mut tar = Tar::default();
    tar.symlink("s", &"n".repeat(256)).file("s/x", b"");
    assert!(error_of(&tar).contains("component of 256 bytes"));
    let mut tar = Tar::default();
    tar.file(".wh.a/x", b"");
    assert!(error_of(&tar).contains("has a whiteout for a directory"));
}

#[test]
fn over_long_names_are_refused() {
    let mut tar = Tar::default();
    tar.file(&"n".repeat(256), b"");
    assert!(error_of(&tar).ends_with("its path has a component of 256 bytes, more than 255"));
    let mut tar = Tar::default();
    tar.file(&"d/".repeat(2100), b"");
    assert!(error_of(&tar).ends_with("its path is 4200 bytes long, more than 4096"));
    let mut tar = Tar::default();
    tar.symlink("s", &"t".repeat(4096));
    assert!(error_of(&tar).ends_with("4096 bytes long: not 1 to 4095"));
    let mut tar = Tar::default();
    tar.symlink("s", "");
    assert!(error_of(&tar).ends_with("0 bytes long: not 1 to 4095"));
}

#[test]
fn the_longest_names_and_targets_work() {
    let name = "n".repeat(255);
    let target = "t/".repeat(2047) + "t";
    let mut tar = Tar::default();
    tar.file(&name, b"x").symlink("s", &target);
    let deep = "d/".repeat(2046);
    tar.dir(&deep);
    let root = Mounted::tar(&tar.finish());
    assert_eq!(root.read(&name), b"x");
    assert_eq!(root.stat("s").link.unwrap().to_str(), Some(&target[..]));
    assert_eq!(root.stat(&"d/".repeat(1900)).mode, 0o40755);
}

#[test]
fn depth_is_bounded_even_through_symlinks() {
    let mut tar = Tar::default();
    let deep = "d/".repeat(2000);
    tar.dir(&deep).symlink("s", deep.trim_end_matches('/'));
    tar.dir(&("s/".to_string() + &"e/".repeat(100)));
    assert!(error_of(&tar).ends_with("it lies more than 2048 directories deep"));
}

#[test]
fn devices_fifos_and_every_mode_bit() {
    let mut tar = Tar::default();
    for (kind, name, numbers) in [
        (b'3', "null", (1, 3)),
        (b'4', "disk", (259, 1_000_000)),
        (b'3', "high", (4095, 0xf_ffff)),
        (b'6', "fifo", (0, 0)),
    ] {
        tar.member_with(kind, name.as_bytes(), b"", b"", |header| {
            header.set_mode(0o7777);
            header.set_device_major(numbers.0).unwrap();
            header.set_device_minor(numbers.1).unwrap();
        });
    }
    let root = Mounted::tar(&tar.finish());
    let rdev = |name| root.stat(name).rdev;
    assert_eq!(rdev("null"), nix::sys::stat::makedev(1, 3));
    assert_eq!(rdev("disk"), nix::sys::stat::makedev(259, 1_000_000));
    assert_eq!(rdev("high"), nix::sys::stat::makedev(4095, 0xf_ffff));
    assert_eq!(root.stat("null").mode, 0o027_777);
    assert_eq!(root.stat("disk").mode, 0o067_777);
    assert_eq!(root.stat("fifo").mode, 0o017_777);

    let mut tar = Tar::default();
    tar.member_with(b'3', b"c", b"", b"", |header| {
        header.set_device_major(4096).unwrap()
    });
    assert!(error_of(&tar).ends_with("its device number 4096:0 does not exist in Linux"));
}

#[test]
fn wide_owners_and_times_before_the_epoch() {
    let mut tar = Tar::default();
    tar.member_with(b'0', b"wide", b"", b"", |header| {
        header.set_uid(4_294_967_294);
        header.set_gid(65_536);
        header.as_old_mut().mtime = [0xff; 12];
    });
    tar.pax(&[
        (b"mtime", b"-1.25"),
        (b"uid", b"4000000000"),
        (b"path", b"p\n\xff"),
    ]);
    tar.file("ignored", b"");
    let root = Mounted::tar(&tar.finish());
    let wide = root.stat("wide");
    assert_eq!(
        (wide.uid, wide.gid, wide.mtime),
        (u32::MAX - 1, 65_536, (-1, 0))
    );
    let name: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"p\n\xff");
    let pax = super::support::stat(&root.path().join(name));
    assert_eq!((pax.uid, pax.mtime), (4_000_000_000, (-2, 750_000_000)));

    // The highest stands for no user at all.
    for uid in [&b"4294967296"[..], b"4294967295"] {
        let mut tar = Tar::default();
        tar.pax(&[(b"uid", uid)]).file("f", b"");
        assert!(error_of(&tar).ends_with("its user id is malformed or too large"));
    }
    let mut tar = Tar::default();
    tar.member_with(b'0', b"f", b"", b"", |header| {
        header.as_old_mut().mode = *b"88888888"
    });
    assert!(error_of(&tar).ends_with("its mode is malformed or too large"));
}

#[test]
fn links_and_directories_have_no_data_whatever_their_size_says() {
    let mut tar = Tar::default();
    tar.file("f", b"x");
    for (kind, name) in [(b'1', "l"), (b'2', "s"), (b'5', "d")] {
        tar.member_with(kind, name.as_bytes(), b"f", b"", |header| {
            header.set_size(5000)
        });
    }
    tar.member(0, b"v7dir/", b"", b"")
        .member(b'7', b"contiguous", b"", b"c");
    let root = Mounted::tar(&tar.finish());
    assert_eq!(root.names(""), ["contiguous", "d", "f", "l", "s", "v7dir"]);
    assert_eq!(root.stat("v7dir").mode & 0o170_000, 0o40_000);
}

#[test]
fn unknown_types_are_refused() {
    let mut tar = Tar::default();
    tar.member(b'M', b"part", b"", b"");
    assert_eq!(
        error_of(&tar),
        "entry 'part' of the layer: its type 'M' is not supported"
    );
    // A global header changes nothing.
    let mut tar = Tar::default();
    tar.member(
        b'g',
        b"pax_global_header",
        b"",
        b"52 comment=0123456789012345678901234567890123456789\n",
    );
    tar.file("f", b"x");
    assert_eq!(Mounted::tar(&tar.finish()).names(""), ["f"]);
}

#[test]
fn attributes_larger_than_a_block_leave_room_for_everything_else() {
    let value = vec![b'v'; 5000];
    let records: [(&[u8], &[u8]); 2] = [
        (b"SCHILY.xattr.user.large", &value),
        (b"SCHILY.xattr.user.small", b"1"),
    ];
    let mut tar = Tar::default();
    tar.pax(&records).dir("d").file("d/x", b"x");
    tar.pax(&records).file("f", b"small content");
    tar.pax(&records).file("big", &[b'b'; 10_000]);
    tar.pax(&[(b"SCHILY.xattr.trusted.t", &value)])
        .symlink("s", "target");
    tar.pax(&[(b"SCHILY.xattr.trusted.t", &value)])
        .member(b'6', b"fifo", b"", b"");
    let root = Mounted::tar(&tar.finish());
    for path in ["d", "f", "big"] {
        assert_eq!(
            root.stat(path).xattr("user.large"),
            Some(&value[..]),
            "{path}"
        );
        assert_eq!(
            root.stat(path).xattr("user.small"),
            Some(&b"1"[..]),
            "{path}"
        );
    }
    for path in ["s", "fifo"] {
        assert_eq!(
            root.stat(path).xattr("trusted.t"),
            Some(&value[..]),
            "{path}"
        );
    }
    assert_eq!(root.stat("s").link.unwrap().to_str(), Some("target"));
    assert_eq!(root.read("f"), b"small content");
    assert_eq!(root.read("big"), [b'b'; 10_000]);
    assert_eq!(root.names("d"), ["x"]);

    let mut tar = Tar::default();
    tar.pax(&[(b"SCHILY.xattr.user.", b"1")]).file("f", b"");
    assert!(error_of(&tar).contains("its extended attribute 'user.': its name"));
}
