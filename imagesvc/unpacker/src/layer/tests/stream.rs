//! The archive as a stream of bytes: compressed, cut, damaged.

use std::io::{self, Cursor, Read, Write};

use flate2::write::GzEncoder;
use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::support::{Mounted, Tar, image_of, image_within, message};
use crate::layer::{Compression, Converted, Error, Limits, convert};

fn sample() -> Tar {
    let mut tar = Tar::default();
    tar.dir("d").file("d/a", &[b'a'; 9000]).file("d/b", b"tail");
    tar.pax(&[(b"SCHILY.xattr.user.k", b"v")])
        .file("c", &[0; 200_000]);
    tar.symlink("s", "d/a")
        .hard_link("h", "d/a")
        .file("d/.wh.x", b"");
    tar
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn converted(bytes: &[u8], declared: Compression) -> Result<(Vec<u8>, Converted), Error> {
    let mut out = Cursor::new(Vec::new());
    let converted = convert(bytes, declared, &Limits::default(), &mut out)?;
    Ok((out.into_inner(), converted))
}

#[test]
fn compression_changes_nothing_and_is_seen_in_the_bytes() {
    let tar = sample().finish();
    let (half, rest) = tar.split_at(tar.len() / 2);
    let expected = image_of(&tar).unwrap();
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let forms = [
        tar.clone(),
        gzip(&tar),
        [gzip(half), gzip(rest)].concat(),
        zstd(&tar),
        [zstd(half), zstd(rest)].concat(),
        [&skippable[..], &zstd(&tar), &skippable].concat(),
    ];
    for form in &forms {
        for declared in [Compression::None, Compression::Gzip, Compression::Zstd] {
            assert_eq!(converted(form, declared).unwrap(), expected);
        }
    }
    let digest: [u8; 32] = Sha256::digest(&tar).into();
    assert_eq!(expected.1.diff_id, digest);
    assert_eq!(expected.1.uncompressed_len, tar.len() as u64);
}

/// Hands out a few bytes at a time, and interruptions between them.
struct Drip<'a>(&'a [u8], usize);

impl Read for Drip<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.1 += 1;
        if self.1.is_multiple_of(5) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let len = buffer.len().min(self.1 % 97 + 1).min(self.0.len());
        let (part, rest) = self.0.split_at(len);
        buffer[..len].copy_from_slice(part);
        self.0 = rest;
        Ok(len)
    }
}

#[test]
fn the_size_of_reads_changes_nothing() {
    let tar = sample().finish();
    let expected = image_of(&tar).unwrap();
    let mut out = Cursor::new(Vec::new());
    let drip = Drip(&tar, 0);
    let got = convert(drip, Compression::None, &Limits::default(), &mut out).unwrap();
    assert_eq!((out.into_inner(), got), expected);
}

#[test]
fn an_archive_that_is_cut_is_an_error() {
    let tar = sample().unfinished();
    for compress in [|bytes: &[u8]| bytes.to_vec(), gzip, zstd] {
        let whole = compress(&tar);
        for len in (1..whole.len()).step_by(if whole.len() > 10_000 { 999 } else { 37 }) {
            let cut = &whole[..len];
            // Between two members there is no telling; the digest does.
            if len % 512 == 0 && whole.len() == tar.len() {
                continue;
            }
            let err = converted(cut, Compression::None).expect_err("cut");
            assert!(
                matches!(err, Error::Truncated { .. } | Error::Read { .. }),
                "{len}: {err:?}"
            );
        }
    }
    assert!(matches!(
        converted(b"", Compression::Gzip),
        Err(Error::Read { .. })
    ));
    assert_eq!(converted(b"", Compression::None).unwrap().1.entries, 0);
}

#[test]
fn no_member_may_be_missing_behind_its_extended_header() {
    let mut tar = Tar::default();
    tar.pax(&[(b"path", b"x")]);
    assert!(matches!(
        image_of(&tar.unfinished()),
        Err(Error::Truncated { .. })
    ));
    assert!(matches!(
        image_of(&tar.finish()),
        Err(Error::Truncated { .. })
    ));
}

#[test]
fn the_end_mark_may_be_missing_but_nothing_follows_it() {
    let tar = sample();
    let whole = image_of(&tar.finish()).unwrap();
    let bare = image_of(&tar.unfinished()).unwrap();
    assert_eq!(whole.1.entries, bare.1.entries);
    // GNU tar pads to 10 KiB.
    let mut padded = tar.finish();
    padded.resize(padded.len() + 10_240, 0);
    image_of(&padded).unwrap();
    let at = padded.len() - 7;
    padded[at] = 1;
    let err = image_of(&padded).unwrap_err();
    assert_eq!(
        message(&err),
        format!("there is data behind the end of the layer's archive, at byte {at}")
    );
}

#[test]
fn bytes_that_are_no_archive_are_an_error() {
    let err = image_of(&[b'x'; 2048]).unwrap_err();
    assert_eq!(
        message(&err),
        "there is no tar header at byte 0 of the layer's archive"
    );
    let err = image_of(b"<html>not found</html>").unwrap_err();
    assert!(matches!(err, Error::Truncated { offset: 0 }));
    let mut broken = gzip(&sample().finish());
    let at = broken.len() - 6;
    broken[at] ^= 1;
    assert!(matches!(
        converted(&broken, Compression::Gzip),
        Err(Error::Read { .. })
    ));
    let trailing = [gzip(&sample().finish()), b"garbage".to_vec()].concat();
    assert!(matches!(
        converted(&trailing, Compression::Gzip),
        Err(Error::Read { .. })
    ));
}

struct Failing(Vec<u8>);

impl Read for Failing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the registry went away",
            ));
        }
        let len = buffer.len().min(self.0.len());
        for (to, from) in buffer.iter_mut().zip(self.0.drain(..len)) {
            *to = from;
        }
        Ok(len)
    }
}

#[test]
fn what_the_reader_says_reaches_the_caller() {
    for compress in [|bytes: &[u8]| bytes.to_vec(), gzip, zstd] {
        let mut bytes = compress(&sample().finish());
        bytes.truncate(bytes.len() / 2);
        let err = convert(
            Failing(bytes),
            Compression::Gzip,
            &Limits::default(),
            Cursor::new(vec![]),
        )
        .unwrap_err();
        match err {
            Error::Read { source, .. } => assert_eq!(source.kind(), io::ErrorKind::ConnectionReset),
            other => panic!("{other:?}"),
        }
    }
}

/// Small enough that a run cannot take long.
fn small_limits() -> Limits {
    Limits {
        max_uncompressed_bytes: 8 << 20,
        max_entries: 200,
        max_metadata_bytes: 4 << 20,
        ..Limits::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damage_never_panics(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        fix_checksums in any::<bool>(),
    ) {
        let mut tar = sample().finish();
        for (at, byte) in damage {
            let at = at.index(tar.len());
            tar[at] = byte;
        }
        if fix_checksums {
            for block in tar.chunks_exact_mut(512) {
                if &block[257..262] == b"ustar" {
                    block[148..156].fill(b' ');
                    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
                    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
        }
        if let Ok((image, _)) = image_within(&tar, &small_limits()) {
            prop_assert!(image.len() as u64 <= small_limits().max_uncompressed_bytes);
        }
    }

    #[test]
    fn noise_never_panics(
        start in prop_oneof![Just(&[][..]), Just(&[0x1f, 0x8b][..]), Just(&[0x28, 0xb5, 0x2f, 0xfd][..])],
        noise in proptest::collection::vec(any::<u8>(), 0..3000),
    ) {
        let bytes = [start, &noise].concat();
        let out = Cursor::new(Vec::new());
        prop_assert!(
            convert(&bytes[..], Compression::None, &small_limits(), out).is_err() || bytes.is_empty()
        );
    }
}

#[test]
fn an_empty_archive_is_an_empty_root() {
    let root = Mounted::tar(&[0; 1024]);
    assert!(root.names("").is_empty());
    assert_eq!(root.stat("").nlink, 2);
}
