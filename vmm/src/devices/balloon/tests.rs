use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;
use vm_memory::{Bytes, FileOffset};

use super::*;
use crate::devices::test_driver::{Driver, Part};

const DEFLATE: usize = 1;
const SIZE: u64 = 4 << 20;
/// Pages that the driver uses for nothing itself.
const PLAY: u64 = 256;

fn anonymous() -> GuestMemoryMmap {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE as usize)]).unwrap();
    fill(&mem);
    mem
}

/// Memory as a `uml` guest has it.
fn shared() -> (GuestMemoryMmap, File) {
    let file = File::from(memfd_create("guest", MFdFlags::empty()).unwrap());
    file.set_len(SIZE).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let range = (GuestAddress(0), SIZE as usize, Some(offset));
    let mem = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
    fill(&mem);
    (mem, file)
}

fn fill(mem: &GuestMemoryMmap) {
    let rest = (SIZE - PLAY * PAGE) as usize;
    mem.write_slice(&vec![7; rest], GuestAddress(PLAY * PAGE))
        .unwrap();
}

fn is_zero(mem: &GuestMemoryMmap, page: u64) -> bool {
    let mut bytes = [1; PAGE as usize];
    mem.read_slice(&mut bytes, GuestAddress(page * PAGE))
        .unwrap();
    assert!(bytes.iter().all(|&b| b == bytes[0]), "half a page");
    bytes[0] == 0
}

fn zero_pages(mem: &GuestMemoryMmap) -> Vec<u64> {
    (PLAY..SIZE / PAGE).filter(|&p| is_zero(mem, p)).collect()
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|p| p.to_le_bytes()).collect()
}

struct Bench {
    balloon: Balloon,
    driver: Driver,
    epoll: Arc<Epoll>,
}

fn bench(mem: GuestMemoryMmap) -> Bench {
    let mut balloon = Balloon::new(0).unwrap();
    let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
    balloon.start(Poller::new(epoll.clone(), 0)).unwrap();
    balloon.set_features(balloon.features());
    let driver = Driver::with_memory(&balloon, mem);
    Bench {
        balloon,
        driver,
        epoll,
    }
}

impl Bench {
    /// One event of the loop; false when there is none.
    fn turn(&mut self) -> bool {
        let mut events = [EpollEvent::empty(); 4];
        let ready = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
        for event in &events[..ready] {
            self.driver
                .with(&mut self.balloon, |balloon, io| {
                    balloon.host_ready(event.data() as u32, event.events(), io)
                })
                .unwrap();
        }
        ready > 0
    }

    fn inflate(&mut self, pages: &[u32]) {
        self.driver.push(INFLATE, &[Part::Read(&numbers(pages))]);
        self.driver.kick(&mut self.balloon, INFLATE);
        assert!(self.driver.used(INFLATE).is_some());
    }

    fn report(&mut self, ranges: &[(u64, u32)]) {
        let raw = |&(addr, len)| Part::Raw {
            addr,
            len,
            write: true,
        };
        let parts: Vec<_> = ranges.iter().map(raw).collect();
        self.driver.push(REPORTING, &parts);
        self.driver.kick(&mut self.balloon, REPORTING);
        assert!(self.driver.used(REPORTING).is_some());
    }
}

#[test]
fn a_target_is_announced_and_the_drivers_answer_kept() {
    let mut bench = bench(anonymous());
    let target = |bench: &mut Bench, bytes| {
        let balloon = &mut bench.balloon;
        bench
            .driver
            .with(balloon, |balloon, io| balloon.set_target(bytes, io));
        bench.driver.irqs.config.load(Ordering::Relaxed)
    };
    assert_eq!(target(&mut bench, 10 * PAGE + 5), 1);
    assert_eq!(target(&mut bench, 10 * PAGE), 1, "nothing new");
    let mut config = [0xff; 12];
    bench.balloon.read_config(0, &mut config);
    assert_eq!(config, [10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bench.balloon.write_config(4, &300u32.to_le_bytes());
    bench.balloon.write_config(0, &[9; 4]);
    bench.balloon.write_config(5, &[2]);
    bench.balloon.write_config(usize::MAX, &[1; 4]);
    assert_eq!(bench.balloon.actual_bytes(), (300 + 256) * PAGE);
    let state = bench.balloon.state();
    assert_eq!((state.target_pages, state.actual_pages), (10, 556));

    assert_eq!(target(&mut bench, u64::MAX), 2);
    bench.balloon.reset();
    let state = bench.balloon.state();
    assert_eq!((state.target_pages, state.actual_pages), (u32::MAX, 0));
}

#[test]
fn pages_of_private_memory_are_given_back_by_number() {
    let mut bench = bench(anonymous());
    bench.inflate(&[400, 302, 300, 301, 302]);
    assert_eq!(zero_pages(&bench.driver.mem), [300, 301, 302, 400]);
    assert_eq!(bench.balloon.reclaimed_bytes(), 4 * PAGE);
    // Deflating says only that they are in use again.
    bench.driver.push(DEFLATE, &[Part::Read(&numbers(&[300]))]);
    bench.driver.kick(&mut bench.balloon, DEFLATE);
    assert!(bench.driver.used(DEFLATE).is_some());
    bench
        .driver
        .mem
        .write_slice(&[1; 4], GuestAddress(300 * PAGE))
        .unwrap();
}

#[test]
fn a_shared_file_gets_holes() {
    let (mem, file) = shared();
    let mut bench = bench(mem);
    let before = file.metadata().unwrap().blocks();
    bench.inflate(&[300, 301]);
    bench.report(&[(500 * PAGE, 8 * PAGE as u32)]);
    let blocks = file.metadata().unwrap().blocks();
    // The driver's own rings took pages as well.
    assert!(blocks <= before + 64 - 10 * PAGE / 512, "{before} {blocks}");
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    let mut zero: Vec<u64> = vec![300, 301];
    zero.extend(500..508);
    assert_eq!(zero_pages(&bench.driver.mem), zero);
}

#[test]
fn reported_ranges_are_given_back_but_for_parts_of_pages() {
    let mut bench = bench(anonymous());
    bench.report(&[
        (600 * PAGE, 2 * PAGE as u32),
        (610 * PAGE + 1, 2 * PAGE as u32),
        (620 * PAGE, PAGE as u32 - 1),
        (630 * PAGE, 0),
    ]);
    assert_eq!(zero_pages(&bench.driver.mem), [600, 601, 611]);
}

#[test]
fn what_lies_outside_of_memory_is_left_out() {
    let mut bench = bench(anonymous());
    let last = (SIZE / PAGE - 1) as u32;
    bench.inflate(&[last, last + 1, u32::MAX, 1 << 20]);
    bench.report(&[
        (u64::MAX - 4095, 4096),
        (u64::MAX - 4000, 100),
        (u64::MAX, u32::MAX / 4),
        ((u64::from(last) - 1) * PAGE, u32::MAX / 4),
        (SIZE, 4096),
    ]);
    let last = u64::from(last);
    assert_eq!(zero_pages(&bench.driver.mem), [last - 1, last]);
    assert!(!bench.balloon.refused);
}

#[test]
fn lists_that_are_no_lists_are_returned() {
    let mut bench = bench(anonymous());
    let raw = |addr, len, write| Part::Raw { addr, len, write };
    bench.driver.push(INFLATE, &[Part::Read(&[1, 2, 3])]);
    bench.driver.push(INFLATE, &[raw(u64::MAX, 16, false)]);
    bench.driver.push(INFLATE, &[raw(0, 0, false)]);
    bench.driver.push(INFLATE, &[raw(PLAY * PAGE, 4096, true)]);
    bench
        .driver
        .push(REPORTING, &[raw(PLAY * PAGE, 4096, false)]);
    bench.driver.kick(&mut bench.balloon, INFLATE);
    bench.driver.kick(&mut bench.balloon, REPORTING);
    assert_eq!(std::iter::from_fn(|| bench.driver.used(INFLATE)).count(), 4);
    assert!(bench.driver.used(REPORTING).is_some());
    assert_eq!(zero_pages(&bench.driver.mem), [] as [u64; 0]);
}

#[test]
fn a_long_queue_is_worked_off_in_turns() {
    let mut bench = bench(anonymous());
    for _ in 0..CHAINS_PER_TURN * 2 + 1 {
        bench.driver.push(INFLATE, &[Part::Read(&numbers(&[300]))]);
    }
    bench.driver.kick(&mut bench.balloon, INFLATE);
    let mut count = || std::iter::from_fn(|| bench.driver.used(INFLATE)).count();
    assert_eq!(count(), CHAINS_PER_TURN);
    assert_eq!(count(), 0);
    while bench.turn() {}
    let rest = std::iter::from_fn(|| bench.driver.used(INFLATE)).count();
    assert_eq!(rest, CHAINS_PER_TURN + 1);
    assert!(!bench.turn(), "woken without work");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Exactly the pages named are given back, whatever their order.
    #[test]
    fn exactly_the_named_pages_go(
        pages in prop::collection::vec(PLAY as u32..(SIZE / PAGE) as u32 + 8, 1..256),
    ) {
        let mut bench = bench(anonymous());
        bench.inflate(&pages);
        let mut named: Vec<u64> = pages.iter().map(|&p| u64::from(p)).collect();
        named.retain(|&p| p < SIZE / PAGE);
        named.sort_unstable();
        named.dedup();
        prop_assert_eq!(zero_pages(&bench.driver.mem), named);
    }
}
