//! What a hostile layer may cost.

use std::io::{Cursor, Read};

use super::support::{Mounted, Tar, image_of, image_within, message};
use crate::layer::{Compression, Error, LimitError, Limits, convert};

fn limits() -> Limits {
    Limits::default()
}

#[test]
fn a_decompression_bomb_is_stopped_early() {
    // 4 GiB of zeros in 4 MiB of gzip, and far less in zstd.
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..4].copy_from_slice(b"bomb");
    header.set_size(1 << 32);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let bomb = zstd::encode_all(
        header.as_bytes().chain(std::io::repeat(0).take(64 << 20)),
        3,
    )
    .unwrap();
    let limits = Limits {
        ratio_floor_bytes: 16 << 20,
        ..limits()
    };
    let mut out = Cursor::new(Vec::new());
    let err = convert(&bomb[..], Compression::Zstd, &limits, &mut out).unwrap_err();
    match err {
        Error::Limit(LimitError::Bomb {
            produced,
            ratio: 200,
            ..
        }) => {
            assert!(produced < 17 << 20, "{produced}");
        }
        other => panic!("{other:?}"),
    }
    let limits = Limits {
        max_uncompressed_bytes: 1 << 20,
        ..limits
    };
    let err = convert(&bomb[..], Compression::Zstd, &limits, &mut out).unwrap_err();
    assert_eq!(
        message(&err),
        "the layer is larger than 1048576 bytes uncompressed"
    );
}

#[test]
fn a_sparse_map_is_no_bomb_either() {
    // Each part of one byte takes a chunk of 64 KiB in the image.
    let parts = 1000u64;
    let map: Vec<String> = (0..parts).map(|part| format!("{},1", part << 20)).collect();
    let size = (parts << 20).to_string();
    let mut tar = Tar::default();
    tar.pax(&[
        (b"GNU.sparse.map", map.join(",").as_bytes()),
        (b"GNU.sparse.size", size.as_bytes()),
        (b"GNU.sparse.name", b"holes"),
    ]);
    tar.file("x", &[1; 1000]);
    let tar = tar.finish();
    let strict = Limits {
        ratio_floor_bytes: 1 << 20,
        ..limits()
    };
    let err = image_within(&tar, &strict).unwrap_err();
    assert!(
        matches!(err, Error::Limit(LimitError::Bomb { .. })),
        "{err:?}"
    );
    // Within the floor it is merely a sparse file.
    let (image, _) = image_of(&tar).unwrap();
    assert!(image.len() < 70 << 20);
    let root = Mounted::image(&image);
    assert_eq!(root.stat("holes").size, parts << 20);
}

#[test]
fn entries_and_metadata_are_bounded() {
    let mut tar = Tar::default();
    for number in 0..100 {
        tar.file(&format!("file-{number}"), b"");
    }
    let few = Limits {
        max_entries: 99,
        ..limits()
    };
    let err = image_within(&tar.finish(), &few).unwrap_err();
    // The root counts too.
    assert_eq!(
        message(&err),
        "entry 'file-98' of the layer: more than 99 entries"
    );
    let little = Limits {
        max_metadata_bytes: 10_000,
        ..limits()
    };
    let err = image_within(&tar.finish(), &little).unwrap_err();
    assert!(message(&err).ends_with("names and attributes need more than 10000 bytes of memory"));

    let mut tar = Tar::default();
    for _ in 0..100 {
        tar.file(".wh..wh.plnk/ignored", b"");
    }
    let err = image_within(&tar.finish(), &few).unwrap_err();
    assert_eq!(message(&err), "the layer has more than 99 entries");
}

#[test]
fn xattrs_of_one_entry_are_bounded() {
    let value = vec![b'v'; 30_000];
    let mut tar = Tar::default();
    tar.pax(&[
        (b"SCHILY.xattr.user.a", &value),
        (b"SCHILY.xattr.user.b", &value),
        (b"SCHILY.xattr.user.c", &value),
    ]);
    tar.file("f", b"");
    let err = image_of(&tar.finish()).unwrap_err();
    assert_eq!(
        message(&err),
        "entry 'f' of the layer: its extended attribute 'user.c': \
         the attributes of one file take more than 65536 bytes"
    );
    // Longer than any header may be.
    let mut tar = Tar::default();
    tar.pax(&[(b"SCHILY.xattr.user.a", &vec![b'v'; 1 << 20])])
        .file("f", b"");
    let err = image_of(&tar.finish()).unwrap_err();
    assert!(matches!(err, Error::HeaderTooLong { .. }), "{err:?}");
}

#[test]
fn files_are_bounded_and_huge_sparse_ones_cost_nothing() {
    let sparse = |size: u64| {
        let mut tar = Tar::default();
        tar.pax(&[
            (b"GNU.sparse.map", format!("{},4", size - 4).as_bytes()),
            (b"GNU.sparse.size", size.to_string().as_bytes()),
        ]);
        tar.file("huge", b"tail");
        tar.finish()
    };
    let (image, _) = image_of(&sparse(1 << 44)).unwrap();
    // A chunk of the data, a map of 1 MiB, no more.
    assert!(image.len() < 68 << 20, "{}", image.len());
    let root = Mounted::image(&image);
    assert_eq!(root.stat("huge").size, 1 << 44);
    let mut file = std::fs::File::open(root.path().join("huge")).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::End(-8)).unwrap();
    let mut end = Vec::new();
    file.read_to_end(&mut end).unwrap();
    assert_eq!(end, b"\0\0\0\0tail");
    drop(file);
    let err = image_of(&sparse((1 << 44) + 1)).unwrap_err();
    assert!(message(&err).ends_with("it is 17592186044417 bytes long, more than 17592186044416"));
}

#[test]
fn tails_beyond_the_budget_get_blocks_of_their_own() {
    let mut tar = Tar::default();
    for number in 0..50 {
        tar.file(
            &format!("f{number}"),
            format!("content {number}").as_bytes(),
        );
    }
    let some = Limits {
        max_tail_bytes: 100,
        ..limits()
    };
    let (image, _) = image_within(&tar.finish(), &some).unwrap();
    assert!(image.len() > image_of(&tar.finish()).unwrap().0.len());
    let root = Mounted::image(&image);
    for number in 0..50 {
        assert_eq!(
            root.read(&format!("f{number}")),
            format!("content {number}").as_bytes()
        );
    }
}

#[test]
fn a_full_disk_is_told_with_the_entry() {
    struct Full(Cursor<Vec<u8>>);
    impl std::io::Write for Full {
        fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
            if self.0.position() > 1 << 20 {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            self.0.write(buffer)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    impl std::io::Seek for Full {
        fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
            self.0.seek(to)
        }
    }
    let mut tar = Tar::default();
    tar.file("small", b"x").file("large", &vec![7; 4 << 20]);
    let out = Full(Cursor::new(Vec::new()));
    let err = convert(&tar.finish()[..], Compression::None, &limits(), out).unwrap_err();
    assert_eq!(
        message(&err),
        "entry 'large' of the layer: cannot write the image: no storage space"
    );
}
