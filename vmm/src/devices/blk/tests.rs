use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::devices::test_driver::{Driver, Part};

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// Sends one request; its status and the data it wrote.
fn request(disk: &mut Blk, kind: u32, sector: u64, out: &[u8], room: u32) -> (u32, Vec<u8>) {
    let mut driver = Driver::new(disk);
    let header = header(kind, sector);
    let mut parts = vec![Part::Read(&header)];
    if !out.is_empty() {
        parts.push(Part::Read(out));
    }
    if room > 0 {
        parts.push(Part::Write(room));
    }
    parts.push(Part::Write(1));
    let chain = driver.push(0, &parts);
    driver.kick(disk, 0);
    let (head, written) = driver.used(0).unwrap();
    assert_eq!(head, u32::from(chain.head));
    let all = driver.read(&chain, room as usize + 1);
    let status = u32::from(all[room as usize]);
    (status, all[..written as usize - 1].to_vec())
}

fn image(layers: &[&[u8]]) -> Blk {
    let mut disk = Blk::empty("image0");
    let files = layers.iter().map(|bytes| file(bytes)).collect();
    let mut driver = Driver::new(&disk);
    driver
        .with(&mut disk, |disk, io| disk.attach(files, io))
        .unwrap();
    assert_eq!(driver.irqs.config.load(Ordering::Relaxed), 1);
    disk
}

fn capacity(disk: &Blk) -> u64 {
    let mut bytes = [0; 8];
    disk.read_config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn a_slot_has_capacity_only_while_a_disk_is_attached() {
    let mut disk = image(&[&[1; 5000]]);
    assert_eq!(capacity(&disk), 16);
    let mut driver = Driver::new(&disk);
    driver.with(&mut disk, |disk, io| disk.detach(io));
    assert_eq!(capacity(&disk), 0);
    assert_eq!(driver.irqs.config.load(Ordering::Relaxed), 1);
    assert_eq!(
        request(&mut disk, VIRTIO_BLK_T_IN, 0, &[], 512).0,
        VIRTIO_BLK_S_IOERR
    );
}

#[test]
fn disks_that_cannot_be_served_are_refused() {
    let mut disk = Blk::empty("image0");
    let mut driver = Driver::new(&disk);
    let mut attach = |files| {
        driver
            .with(&mut disk, |disk, io| disk.attach(files, io))
            .unwrap_err()
            .to_string()
    };
    assert!(attach(vec![]).contains("no file"));
    assert!(attach(vec![file(b"x"), file(b"")]).contains("file 1 of the disk is empty"));
    let directory = File::open("/").unwrap();
    assert!(attach(vec![directory]).contains("no regular file"));
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(1).unwrap();
    let write_only = File::options().write(true).open(named.path()).unwrap();
    assert!(attach(vec![write_only]).contains("not open for reading"));
    assert_eq!(driver.irqs.config.load(Ordering::Relaxed), 0);
    assert!(Blk::scratch("scratch", file(&[0; 100])).is_err());
}

#[test]
fn an_image_is_read_only_and_names_itself() {
    let mut disk = image(&[&[1; 4096]]);
    let (status, _) = request(&mut disk, VIRTIO_BLK_T_OUT, 0, &[0; 512], 0);
    assert_eq!(status, VIRTIO_BLK_S_IOERR);
    let (status, _) = request(&mut disk, VIRTIO_BLK_T_DISCARD, 0, &[0; 16], 0);
    assert_eq!(status, VIRTIO_BLK_S_UNSUPP);
    let (status, id) = request(&mut disk, VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!(status, VIRTIO_BLK_S_OK);
    assert_eq!(&id[..7], b"image0\0");
    let (status, _) = request(&mut disk, 0x1234, 0, &[], 0);
    assert_eq!(status, VIRTIO_BLK_S_UNSUPP);
}

#[test]
fn requests_outside_of_the_disk_fail() {
    let mut disk = image(&[&[1; 4096]]);
    for (sector, room) in [
        (8, 512),
        (7, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 100),
    ] {
        let (status, data) = request(&mut disk, VIRTIO_BLK_T_IN, sector, &[], room);
        assert_eq!(
            (status, data.len()),
            (VIRTIO_BLK_S_IOERR, 0),
            "sector {sector}"
        );
    }
}

#[test]
fn a_file_that_shrank_gives_an_error_and_nothing_else() {
    let backing = file(&[7; 8192]);
    let shrink = backing.try_clone().unwrap();
    let mut disk = Blk::empty("image0");
    let mut driver = Driver::new(&disk);
    driver
        .with(&mut disk, |disk, io| disk.attach(vec![backing], io))
        .unwrap();
    shrink.set_len(4096).unwrap();
    let (status, data) = request(&mut disk, VIRTIO_BLK_T_IN, 0, &[], 4096);
    assert_eq!((status, data), (VIRTIO_BLK_S_OK, vec![7; 4096]));
    let (status, _) = request(&mut disk, VIRTIO_BLK_T_IN, 8, &[], 512);
    assert_eq!(status, VIRTIO_BLK_S_IOERR);
}

#[test]
fn the_scratch_disk_is_written_flushed_and_punched() {
    let backing = file(&[0; 64 << 10]);
    let view = backing.try_clone().unwrap();
    let mut disk = Blk::scratch("scratch", backing).unwrap();
    let (status, _) = request(&mut disk, VIRTIO_BLK_T_OUT, 8, &[9; 32 << 10], 0);
    assert_eq!(status, VIRTIO_BLK_S_OK);
    assert_eq!(
        request(&mut disk, VIRTIO_BLK_T_FLUSH, 0, &[], 0).0,
        VIRTIO_BLK_S_OK
    );
    let mut bytes = [0; 32 << 10];
    view.read_exact_at(&mut bytes, 4096).unwrap();
    assert!(bytes.iter().all(|&b| b == 9));

    let range = |sector: u64, count: u32, flags: u32| {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(count.to_le_bytes());
        range.extend(flags.to_le_bytes());
        range
    };
    let blocks = view.metadata().unwrap().blocks();
    let (status, _) = request(&mut disk, VIRTIO_BLK_T_DISCARD, 0, &range(8, 16, 0), 0);
    assert_eq!(status, VIRTIO_BLK_S_OK);
    assert!(view.metadata().unwrap().blocks() < blocks);
    let both = [range(24, 8, 0), range(32, 8, 1)].concat();
    let (status, _) = request(&mut disk, VIRTIO_BLK_T_WRITE_ZEROES, 0, &both, 0);
    assert_eq!(status, VIRTIO_BLK_S_OK);
    view.read_exact_at(&mut bytes, 4096).unwrap();
    assert!(bytes[..16 << 10].iter().all(|&b| b == 0));
    assert!(bytes[16 << 10..].iter().all(|&b| b == 9));

    for bad in [
        range(127, 2, 0),
        range(u64::MAX, 1, 0),
        range(0, u32::MAX, 0),
    ] {
        let (status, _) = request(&mut disk, VIRTIO_BLK_T_WRITE_ZEROES, 0, &bad, 0);
        assert_eq!(status, VIRTIO_BLK_S_IOERR);
    }
    let (status, _) = request(&mut disk, VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 1), 0);
    assert_eq!(status, VIRTIO_BLK_S_UNSUPP, "discard knows no unmap flag");
}

#[test]
fn hostile_chains_are_given_back() {
    let mut disk = image(&[&[1; 4096]]);
    let mut driver = Driver::new(&disk);
    let read = header(VIRTIO_BLK_T_IN, 0);
    let outside = |len| Part::Raw {
        addr: u64::MAX - 8,
        len,
        write: true,
    };
    // No status byte; a header cut short; buffers outside of memory.
    driver.push(0, &[Part::Read(&read)]);
    let cut = driver.push(0, &[Part::Read(&read[..10]), Part::Write(1)]);
    driver.push(0, &[Part::Read(&read), outside(512), Part::Write(1)]);
    driver.push(0, &[Part::Read(&read), Part::Write(512), outside(1)]);
    driver.kick(&mut disk, 0);
    let written: Vec<_> = std::iter::from_fn(|| driver.used(0))
        .map(|(_, n)| n)
        .collect();
    assert_eq!(written, [0, 1, 0, 0]);
    assert_eq!(driver.read(&cut, 1), [VIRTIO_BLK_S_IOERR as u8]);
}

proptest! {
    /// Any read of any image equals the layers padded and put together.
    #[test]
    fn images_are_their_layers_one_after_another(
        lens in prop::collection::vec(1usize..20_000, 1..6),
        place in 0.0f64..1.0,
        sectors in 1u32..40,
    ) {
        let mut whole = Vec::new();
        let mut layers = Vec::new();
        for (number, len) in lens.into_iter().enumerate() {
            let bytes: Vec<u8> = (0..len).map(|i| (i / 3 + number * 17) as u8 | 1).collect();
            whole.extend(&bytes);
            whole.resize(whole.len().next_multiple_of(4096), 0);
            layers.push(bytes);
        }
        let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
        let mut disk = image(&layers);
        let all = whole.len() as u64 / 512;
        prop_assert_eq!(capacity(&disk), all);
        let sector = (all as f64 * place) as u64;
        let sectors = u64::from(sectors).min(all - sector);
        let (status, data) = request(
            &mut disk, VIRTIO_BLK_T_IN, sector, &[], sectors as u32 * 512,
        );
        prop_assert_eq!(status, VIRTIO_BLK_S_OK);
        let from = sector as usize * 512;
        prop_assert_eq!(&data, &whole[from..from + sectors as usize * 512]);
    }
}
