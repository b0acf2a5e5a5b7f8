//! How quick the device is without a guest, on a cached file: run with
//! `cargo test --release -p drupe-vmm -- --ignored --nocapture blk::bench`.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::test_driver::{Driver, Part};

const FILE: u64 = 64 << 20;
const HEADERS: u64 = 0x10_0000;
const STATUS: u64 = 0x11_0000;
const DATA: u64 = 0x12_0000;

/// Median of five rounds of `total` requests, `depth` at once.
fn run(name: &str, kind: u32, depth: u64, size: u32, total: u64) {
    let mut file = tempfile::tempfile_in(std::env::temp_dir()).unwrap();
    for _ in 0..FILE >> 20 {
        file.write_all(&[7; 1 << 20]).unwrap();
    }
    let mut disk = Blk::scratch("bench", file).unwrap();
    let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
    disk.start(Poller::new(epoll.clone(), 0)).unwrap();
    let mut driver = Driver::new(&disk);
    let mut at = 12345u64;
    let mut rounds: Vec<Duration> = (0..5)
        .map(|_| {
            let start = Instant::now();
            let (mut sent, mut done) = (0, 0);
            while done < total {
                let room = depth - (sent - done);
                for _ in 0..room.min(total - sent) {
                    at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let sector = (at >> 20) % (FILE / u64::from(size)) * u64::from(size) / SECTOR;
                    let slot = sent % depth;
                    let header = GuestAddress(HEADERS + 16 * slot);
                    driver.mem.write_obj(kind, header).unwrap();
                    driver
                        .mem
                        .write_obj(sector, GuestAddress(header.0 + 8))
                        .unwrap();
                    let raw = |addr, len, write| Part::Raw { addr, len, write };
                    driver.push(
                        0,
                        &[
                            raw(header.0, 16, false),
                            raw(DATA + u64::from(size) * slot, size, kind == VIRTIO_BLK_T_IN),
                            raw(STATUS + slot, 1, true),
                        ],
                    );
                    sent += 1;
                }
                driver.kick(&mut disk, 0);
                let before = done;
                loop {
                    while driver.used(0).is_some() {
                        done += 1;
                    }
                    if done > before {
                        break;
                    }
                    let mut events = [EpollEvent::empty(); 4];
                    let ready = epoll.wait(&mut events, EpollTimeout::NONE).unwrap();
                    for event in &events[..ready] {
                        driver
                            .with(&mut disk, |disk, io| {
                                disk.host_ready(event.data() as u32, event.events(), io)
                            })
                            .unwrap();
                    }
                }
            }
            start.elapsed()
        })
        .collect();
    rounds.sort();
    let each = rounds[2] / u32::try_from(total).unwrap();
    let mib = total as f64 * f64::from(size) / f64::from(1 << 20) / rounds[2].as_secs_f64();
    println!("{name:28} {each:>10.2?} a request, {mib:>8.0} MiB/s");
}

#[test]
#[ignore = "a measurement, not a test"]
fn cached_requests() {
    run(
        "read 4 KiB, one at a time",
        VIRTIO_BLK_T_IN,
        1,
        4096,
        50_000,
    );
    run(
        "read 4 KiB, 32 at a time",
        VIRTIO_BLK_T_IN,
        32,
        4096,
        50_000,
    );
    run(
        "read 64 KiB, one at a time",
        VIRTIO_BLK_T_IN,
        1,
        65536,
        10_000,
    );
    run(
        "read 64 KiB, 32 at a time",
        VIRTIO_BLK_T_IN,
        32,
        65536,
        10_000,
    );
    run(
        "write 4 KiB, one at a time",
        VIRTIO_BLK_T_OUT,
        1,
        4096,
        50_000,
    );
    run(
        "write 4 KiB, 32 at a time",
        VIRTIO_BLK_T_OUT,
        32,
        4096,
        50_000,
    );
    run(
        "write 64 KiB, 32 at a time",
        VIRTIO_BLK_T_OUT,
        32,
        65536,
        5_000,
    );
}
