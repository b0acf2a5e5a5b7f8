use std::io::Write;
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, channel, sync_channel};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::test_driver::{Chain, Driver, Part};

const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough for another thread of a busy machine to do something wrong.
const MOMENT: Duration = Duration::from_millis(50);

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

/// Waits for what other threads do.
fn settle(driver: &mut Driver, disk: &mut Blk) -> io::Result<()> {
    while !disk.flight.is_empty() {
        let mut events = [PollFd::new(disk.flight.event().as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut events, PollTimeout::from(10_000u16)).unwrap(), 1);
        driver.with(disk, |disk, io| {
            disk.host_ready(LANDED, EpollFlags::EPOLLIN, io)
        })?;
    }
    Ok(())
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
    settle(&mut driver, disk).unwrap();
    let (head, written) = driver.used(0).unwrap();
    assert_eq!(head, u32::from(chain.head));
    let all = driver.read(&chain, room as usize + 1);
    let status = u32::from(all[room as usize]);
    (status, all[..written as usize - 1].to_vec())
}

fn image(layers: &[&[u8]]) -> Blk {
    let mut disk = Blk::empty("image0").unwrap();
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
    let mut disk = Blk::empty("image0").unwrap();
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
fn only_a_block_device_backs_a_slot_as_one() {
    let mut disk = Blk::empty("image0").unwrap();
    let mut driver = Driver::new(&disk);
    let mut attach = |device: File| {
        driver
            .with(&mut disk, |disk, io| disk.attach_device(device, true, io))
            .unwrap_err()
            .to_string()
    };
    assert!(attach(file(&[1; 4096])).contains("no block device"));
    assert!(attach(File::open("/dev/null").unwrap()).contains("no block device"));
    assert_eq!(capacity(&disk), 0);
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
fn a_file_that_shrank_fails_its_request_and_ends_the_machine_by_name() {
    let backing = file(&[7; 8192]);
    let shrink = backing.try_clone().unwrap();
    let mut disk = Blk::empty("image0").unwrap();
    let mut driver = Driver::new(&disk);
    driver
        .with(&mut disk, |disk, io| {
            disk.attach(vec![file(&[1; 100]), backing], io)
        })
        .unwrap();
    shrink.set_len(4096).unwrap();
    let (status, data) = request(&mut disk, VIRTIO_BLK_T_IN, 8, &[], 4096);
    assert_eq!((status, data), (VIRTIO_BLK_S_OK, vec![7; 4096]));

    let read = header(VIRTIO_BLK_T_IN, 16);
    let parts = [Part::Read(&read), Part::Write(512), Part::Write(1)];
    let chain = driver.push(0, &parts);
    let error = driver
        .with(&mut disk, |disk, io| disk.kicked(0, io))
        .unwrap_err();
    let why = "file 1 of the disk has shrunk from 8192 to 4096 bytes";
    assert_eq!(error.to_string(), why);
    assert_eq!(driver.used(0), Some((u32::from(chain.head), 1)));
    assert_eq!(driver.read(&chain, 513)[512], VIRTIO_BLK_S_IOERR as u8);
}

#[test]
fn a_scratch_file_that_shrank_is_not_written_whole_again() {
    for (kind, data) in [
        (VIRTIO_BLK_T_OUT, vec![9; 512]),
        (VIRTIO_BLK_T_FLUSH, vec![]),
        (
            VIRTIO_BLK_T_DISCARD,
            [8u64, 8].map(u64::to_le_bytes).concat(),
        ),
    ] {
        let backing = file(&[0; 16 << 10]);
        let view = backing.try_clone().unwrap();
        let mut disk = Blk::scratch("scratch", backing).unwrap();
        view.set_len(8192).unwrap();
        let mut driver = Driver::new(&disk);
        let head = header(kind, 24);
        let mut parts = vec![Part::Read(&head)];
        if !data.is_empty() {
            parts.push(Part::Read(&data));
        }
        parts.push(Part::Write(1));
        let chain = driver.push(0, &parts);
        let kicked = driver.with(&mut disk, |disk, io| disk.kicked(0, io));
        let error = kicked.and_then(|()| settle(&mut driver, &mut disk));
        let error = error.unwrap_err().to_string();
        assert!(
            error.ends_with("shrunk from 16384 to 8192 bytes"),
            "{error}"
        );
        assert_eq!(driver.used(0), Some((u32::from(chain.head), 1)));
        assert_eq!(driver.read(&chain, 1), [VIRTIO_BLK_S_IOERR as u8]);
        assert_eq!(view.metadata().unwrap().len(), 8192);
    }
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

/// Ranges of a discard or write-zeroes request: sector, sectors, flags.
fn ranges(list: &[(u64, u32, u32)]) -> Vec<u8> {
    list.iter()
        .flat_map(|(sector, count, flags)| {
            let mut range = sector.to_le_bytes().to_vec();
            range.extend(count.to_le_bytes());
            range.extend(flags.to_le_bytes());
            range
        })
        .collect()
}

#[test]
fn one_request_clears_64_mib_at_most() {
    let backing = file(&[]);
    backing.set_len(128 << 20).unwrap();
    let mut disk = Blk::scratch("scratch", backing).unwrap();
    let mut config = [0; 60];
    disk.read_config(0, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    for at in [36, 48] {
        let (sectors, ranges) = (u64::from(word(at)), u64::from(word(at + 4)));
        assert_eq!(sectors * SECTOR * ranges, 64 << 20);
    }
    let most = (word(36), word(40) as usize);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for (list, status) in [
            (vec![(0, most.0, 0); most.1], VIRTIO_BLK_S_OK),
            (vec![(0, most.0 + 1, 0)], VIRTIO_BLK_S_IOERR),
            (vec![(0, 1, 0); most.1 + 1], VIRTIO_BLK_S_IOERR),
        ] {
            let (got, _) = request(&mut disk, kind, 0, &ranges(&list), 0);
            assert_eq!(got, status, "{kind}: {} ranges", list.len());
        }
    }
}

#[test]
fn what_is_cleared_counts_against_the_limit() {
    let limit = RateLimit {
        bytes_per_second: NonZeroU64::new(1 << 16),
        ..RateLimit::default()
    };
    for (kind, flags) in [
        (VIRTIO_BLK_T_DISCARD, 0),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0),
        (VIRTIO_BLK_T_WRITE_ZEROES, 1),
    ] {
        let backing = file(&[]);
        backing.set_len(16 << 20).unwrap();
        let disk = Blk::scratch("scratch", backing).unwrap();
        let mut disk = disk.with_rate_limit(limit).unwrap();
        let mut driver = Driver::new(&disk);
        // 3 MiB of ranges, then a request that has to wait for them.
        let list = ranges(&[(0, 4096, flags), (8192, 2048, flags)]);
        let (clear, identify) = (header(kind, 0), header(VIRTIO_BLK_T_GET_ID, 0));
        let parts = [Part::Read(&clear), Part::Read(&list), Part::Write(1)];
        driver.push(0, &parts);
        driver.push(0, &[Part::Read(&identify), Part::Write(21)]);
        driver.kick(&mut disk, 0);
        settle(&mut driver, &mut disk).unwrap();
        assert_eq!(std::iter::from_fn(|| driver.used(0)).count(), 1);
        let throttle = disk.throttle.as_mut().unwrap();
        let wait = throttle.limiter.wait(throttle.since.elapsed()).unwrap();
        // Of the 48 seconds, those that the test has taken are over.
        assert!(wait > PATIENCE, "{kind} {flags}: {wait:?}");
    }
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

/// A scratch disk none of whose threads comes to its requests until the gate
/// is opened.
struct Gated {
    disk: Blk,
    driver: Driver,
    view: File,
    gate: Vec<SyncSender<()>>,
}

fn gated() -> Gated {
    let backing = file(&[1; 64 << 10]);
    let view = backing.try_clone().unwrap();
    let workers = Workers::default();
    let (started, starts) = channel();
    let gate = (0..4)
        .map(|_| {
            let (open, wait) = sync_channel(1);
            let started = started.clone();
            workers.run(Box::new(move || {
                started.send(()).unwrap();
                wait.recv().unwrap();
            }));
            open
        })
        .collect();
    for _ in 0..4 {
        starts.recv_timeout(PATIENCE).unwrap();
    }
    let disk = Blk::scratch("scratch", backing)
        .unwrap()
        .with_workers(&workers);
    let driver = Driver::new(&disk);
    Gated {
        disk,
        driver,
        view,
        gate,
    }
}

impl Gated {
    fn push(&mut self, kind: u32, sector: u64) -> Chain {
        let head = header(kind, sector);
        let data = [9; 512];
        let mut parts = vec![Part::Read(&head)];
        if kind == VIRTIO_BLK_T_OUT {
            parts.push(Part::Read(&data));
        }
        parts.push(Part::Write(1));
        self.driver.push(0, &parts)
    }

    fn heads(&mut self) -> Vec<u16> {
        std::iter::from_fn(|| self.driver.used(0))
            .map(|(head, _)| head as u16)
            .collect()
    }

    fn open(&mut self) {
        for gate in self.gate.drain(..) {
            gate.send(()).unwrap();
        }
    }
}

#[test]
fn a_flush_covers_the_writes_before_it_and_waits_for_no_other() {
    let mut gated = gated();
    let chains = [
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_FLUSH,
    ];
    let chains = chains.map(|kind| gated.push(kind, 0).head);
    gated.driver.kick(&mut gated.disk, 0);
    assert_eq!(gated.heads(), [] as [u16; 0]);
    gated.open();
    settle(&mut gated.driver, &mut gated.disk).unwrap();
    let order = gated.heads();
    let at = |n: usize| order.iter().position(|&head| head == chains[n]).unwrap();
    assert_eq!(order.len(), 5);
    assert!(at(2) > at(0).max(at(1)), "{order:?}");
    assert!(at(4) > at(0).max(at(1)).max(at(3)), "{order:?}");
}

#[test]
fn a_reset_waits_for_what_is_under_way_and_forgets_the_rest() {
    let mut gated = gated();
    let chains = [0, 1, 2].map(|sector| gated.push(VIRTIO_BLK_T_OUT, sector));
    let flush = gated.push(VIRTIO_BLK_T_FLUSH, 0);
    gated.driver.kick(&mut gated.disk, 0);
    let status = |gated: &Gated, chain: &Chain| gated.driver.read(chain, 1)[0];
    for chain in &chains {
        let at = GuestAddress(chain.writable[0].0);
        gated.driver.mem.write_obj(0xffu8, at).unwrap();
    }
    let gate = std::mem::take(&mut gated.gate);
    std::thread::scope(|scope| {
        let (done, resets) = channel();
        let disk = &mut gated.disk;
        scope.spawn(move || {
            disk.reset();
            done.send(()).unwrap();
        });
        let early = resets.recv_timeout(MOMENT);
        for open in gate {
            open.send(()).unwrap();
        }
        assert_eq!(early, Err(RecvTimeoutError::Timeout), "it did not wait");
        resets.recv_timeout(PATIENCE).unwrap();
    });
    for chain in &chains {
        assert_eq!(status(&gated, chain), 0xff, "done after the reset");
    }
    assert_eq!(status(&gated, &flush), 0);
    let mut bytes = [0; 2048];
    gated.view.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [1; 2048]);

    // Its wake-up finds nothing, and the disk goes on.
    let wake = |disk: &mut Blk, io: &mut Io<'_>| disk.host_ready(LANDED, EpollFlags::EPOLLIN, io);
    gated.driver.with(&mut gated.disk, wake).unwrap();
    assert_eq!(gated.heads(), [] as [u16; 0]);
    let (status, _) = request(&mut gated.disk, VIRTIO_BLK_T_OUT, 0, &[9; 512], 0);
    assert_eq!(status, VIRTIO_BLK_S_OK);
}

#[test]
fn requests_under_way_are_bounded_whatever_the_driver_gives() {
    let mut gated = gated();
    for round in 0..3 {
        for _ in 0..100 {
            gated.push(VIRTIO_BLK_T_FLUSH, 0);
        }
        gated.driver.kick(&mut gated.disk, 0);
        while gated.disk.flight.event().read().is_ok() {
            let wake = |disk: &mut Blk, io: &mut Io<'_>| disk.take_requests(io);
            gated.driver.with(&mut gated.disk, wake).unwrap();
        }
        assert_eq!(gated.disk.flight.is_full(), round == 2);
    }
    gated.open();
    settle(&mut gated.driver, &mut gated.disk).unwrap();
    assert_eq!(gated.heads().len(), 300);
}

#[test]
fn a_rate_limit_holds_requests_back_until_its_timer_rings() {
    let limit = RateLimit {
        requests_per_second: NonZeroU64::new(100),
        ..RateLimit::default()
    };
    let mut disk = image(&[&[1; 4096]]).with_rate_limit(limit).unwrap();
    let epoll = Arc::new(Epoll::new(EpollCreateFlags::empty()).unwrap());
    disk.start(Poller::new(epoll.clone(), 0)).unwrap();
    let mut driver = Driver::new(&disk);
    let identify = header(VIRTIO_BLK_T_GET_ID, 0);
    for _ in 0..20 {
        driver.push(0, &[Part::Read(&identify), Part::Write(21)]);
    }
    let start = Instant::now();
    driver.kick(&mut disk, 0);
    let mut done = std::iter::from_fn(|| driver.used(0)).count();
    assert!((10..20).contains(&done), "{done} at once");
    let mut wakes = 0;
    while done < 20 {
        let mut events = [EpollEvent::empty(); 4];
        let ready = epoll.wait(&mut events, EpollTimeout::from(10_000u16));
        assert_eq!(ready.unwrap(), 1, "the timer did not ring");
        wakes += 1;
        let token = events[0].data() as u32;
        assert_eq!(token, TIMER);
        driver
            .with(&mut disk, |disk, io| {
                disk.host_ready(token, EpollFlags::EPOLLIN, io)
            })
            .unwrap();
        done += std::iter::from_fn(|| driver.used(0)).count();
    }
    assert!(start.elapsed() >= Duration::from_millis(80));
    assert!(wakes <= 10, "{wakes} wake-ups");
    let mut events = [EpollEvent::empty(); 4];
    assert_eq!(epoll.wait(&mut events, 50u8).unwrap(), 0, "woken when idle");
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
