//! On a real tap in a network namespace of the test's thread.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::pair::TX_BUDGET;
use super::*;
use crate::devices::test_driver::{Driver, Part};

const RX: usize = 0;
const TX: usize = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ALL: u64 = u64::MAX;

const TAP_FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A queue of the tap `name`.
fn tun(name: u8, flags: libc::c_int) -> (File, libc::ifreq) {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = name as libc::c_char;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    assert_eq!(0, unsafe {
        libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &mut request)
    });
    (tun, request)
}

/// A tap that is up, and a packet socket behind it.
fn tap(flags: libc::c_int) -> (File, OwnedFd) {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let (tun, mut request) = tun(b't', flags);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    let raw = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .unwrap();
    // SAFETY: SIOCSIFFLAGS reads one ifreq.
    assert_eq!(0, unsafe {
        libc::ioctl(raw.as_raw_fd(), libc::SIOCSIFFLAGS as _, &mut request)
    });
    // SAFETY: SIOCGIFINDEX fills in one ifreq.
    assert_eq!(0, unsafe {
        libc::ioctl(raw.as_raw_fd(), libc::SIOCGIFINDEX as _, &mut request)
    });
    // SAFETY: SIOCGIFINDEX sets this member of the union.
    let index = unsafe { request.ifr_ifru.ifru_ifindex };
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index;
    let size = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is a sockaddr_ll of the given size.
    assert_eq!(0, unsafe {
        libc::bind(raw.as_raw_fd(), (&raw const address).cast(), size)
    });
    (tun, raw)
}

/// A frame of a local experimental protocol, so that nobody answers.
fn frame(len: usize, fill: u8) -> Vec<u8> {
    let mut frame = vec![fill; len];
    frame[..12].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9]);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

struct Bench {
    net: Net,
    driver: Driver,
    raw: OwnedFd,
    epoll: Arc<Epoll>,
}

fn bench(features: u64) -> Bench {
    let (tun, raw) = tap(TAP_FLAGS);
    bench_of(vec![tun], raw, features)
}

/// On a tap with `queues` queues.
fn bench_with_queues(queues: usize) -> Bench {
    let flags = TAP_FLAGS | libc::IFF_MULTI_QUEUE;
    let (first, raw) = tap(flags);
    let mut taps = vec![first];
    taps.extend((1..queues).map(|_| tun(b't', flags).0));
    bench_of(taps, raw, ALL)
}

fn bench_of(taps: Vec<File>, raw: OwnedFd, features: u64) -> Bench {
    let mut net = Net::new(taps, MAC, Some(1400)).unwrap();
    let epoll = Arc::new(Epoll::new(EpollCreateFlags::empty()).unwrap());
    net.start(Poller::new(epoll.clone(), 0)).unwrap();
    net.set_features(features & net.features());
    let driver = Driver::new(&net);
    Bench {
        net,
        driver,
        raw,
        epoll,
    }
}

impl Bench {
    fn send(&self, bytes: &[u8]) {
        let sent = nix::unistd::write(&self.raw, bytes).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// Runs the device on what is ready; false when nothing is.
    fn turn(&mut self) -> bool {
        let mut events = [EpollEvent::empty(); 4];
        let ready = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
        for event in &events[..ready] {
            let net = &mut self.net;
            self.driver
                .with(net, |net, io| {
                    net.host_ready(event.data() as u32, event.events(), io)
                })
                .unwrap();
        }
        ready > 0
    }

    /// The next used receive buffers that hold a frame of the tests' own kind
    /// (the kernel sends some of its own), header included.
    fn received(
        &mut self,
        chains: &mut std::vec::IntoIter<crate::devices::test_driver::Chain>,
    ) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            assert!(Instant::now() < deadline, "nothing received");
            self.turn();
            let Some((head, len)) = self.driver.used(RX) else {
                continue;
            };
            let first = chains.next().unwrap();
            assert_eq!(u32::from(first.head), head);
            let mut packet = self.driver.read(&first, len as usize);
            let buffers = u16::from_le_bytes([packet[10], packet[11]]);
            for _ in 1..buffers {
                let (head, len) = self.driver.used(RX).unwrap();
                let next = chains.next().unwrap();
                assert_eq!(u32::from(next.head), head);
                packet.extend(self.driver.read(&next, len as usize));
            }
            if packet[HEADER + 12..HEADER + 14] == [0x88, 0xb5] {
                return packet;
            }
        }
    }
}

/// Network namespaces belong to threads.
fn on_a_thread(test: impl FnOnce() + Send + 'static) {
    thread::spawn(test).join().unwrap();
}

#[test]
fn a_packet_is_spread_over_merged_buffers() {
    on_a_thread(|| {
        let mut bench = bench(ALL);
        let chains: Vec<_> = (0..250)
            .map(|_| bench.driver.push(RX, &[Part::Write(300)]))
            .collect();
        let mut chains = chains.into_iter();
        bench.driver.kick(&mut bench.net, RX);
        for len in [60, 288, 289, 1000, 1514] {
            let sent = frame(len, len as u8);
            bench.send(&sent);
            let got = bench.received(&mut chains);
            assert_eq!(got.len(), HEADER + len);
            assert!(got[HEADER..] == sent);
            let buffers = u16::from_le_bytes([got[10], got[11]]);
            assert_eq!(usize::from(buffers), (HEADER + len).div_ceil(300));
        }
    });
}

#[test]
fn the_tap_is_left_alone_while_the_guest_has_no_buffers() {
    on_a_thread(|| {
        // No merging and no segments: one buffer a packet is enough.
        let mut bench = bench(0);
        bench.driver.kick(&mut bench.net, RX);
        bench.send(&frame(100, 1));
        assert!(!bench.turn(), "watched without a buffer");
        let first = vec![bench.driver.push(RX, &[Part::Write(2000)])];
        bench.driver.kick(&mut bench.net, RX);
        // The kernel's own packets may have taken it; then give another.
        let mut chains = first;
        for _ in 0..50 {
            chains.push(bench.driver.push(RX, &[Part::Write(2000)]));
        }
        bench.driver.kick(&mut bench.net, RX);
        let got = bench.received(&mut chains.into_iter());
        assert_eq!(got[HEADER..], frame(100, 1));
    });
}

#[test]
fn packets_of_the_guest_reach_the_host_and_bad_ones_are_lost() {
    on_a_thread(|| {
        let mut bench = bench(ALL);
        let header = [0; HEADER];
        // A header that asks for a checksum beyond the packet's end.
        let mut evil = header;
        evil[0] = 1;
        evil[6..8].copy_from_slice(&u16::MAX.to_le_bytes());
        let sent = frame(700, 5);
        let driver = &mut bench.driver;
        driver.push(TX, &[Part::Read(&header[..5])]);
        driver.push(TX, &[Part::Read(&evil), Part::Read(&sent)]);
        driver.push(
            TX,
            &[Part::Raw {
                addr: u64::MAX,
                len: 100,
                write: false,
            }],
        );
        driver.push(TX, &[Part::Read(&header), Part::Read(&sent)]);
        driver.kick(&mut bench.net, TX);
        assert_eq!(std::iter::from_fn(|| bench.driver.used(TX)).count(), 4);
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut buffer = [0; 2000];
        loop {
            assert!(Instant::now() < deadline, "nothing came out of the tap");
            if let Ok(len) = nix::unistd::read(&bench.raw, &mut buffer)
                && buffer[12..14] == [0x88, 0xb5]
            {
                assert!(buffer[..len] == sent);
                break;
            }
        }
    });
}

#[test]
fn a_checksum_is_written_over_nothing_else_and_long_packets_stay_whole() {
    on_a_thread(|| {
        let mut bench = bench(ALL);
        let mut ip = frame(1200, 3);
        ip[12..14].copy_from_slice(&[8, 0]);
        ip[14..34].copy_from_slice(&[
            0x45, 0, 4, 0xa2, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        let mut header = [0; HEADER];
        header[0] = 1;
        // Over the source address, then over UDP's checksum.
        for (start, offset) in [(22u16, 4u16), (34, 6)] {
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
            ip[41] = start as u8;
            let parts = [
                Part::Read(&header[..]),
                Part::Read(&ip[..300]),
                Part::Read(&ip[300..]),
            ];
            bench.driver.push(TX, &parts);
        }
        bench.driver.kick(&mut bench.net, TX);
        assert_eq!(std::iter::from_fn(|| bench.driver.used(TX)).count(), 2);
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut buffer = [0; 2000];
        loop {
            assert!(Instant::now() < deadline, "nothing came out of the tap");
            if let Ok(len) = nix::unistd::read(&bench.raw, &mut buffer)
                && buffer[12..14] == [8, 0]
            {
                assert!(buffer[..len] == ip, "the first was sent, or changed");
                break;
            }
        }
    });
}

#[test]
fn a_long_queue_is_sent_in_turns() {
    on_a_thread(|| {
        let mut bench = bench(ALL);
        let packet = [vec![0; HEADER], frame(60, 1)].concat();
        for _ in 0..TX_BUDGET * 2 + 1 {
            bench.driver.push(TX, &[Part::Read(&packet)]);
        }
        bench.driver.kick(&mut bench.net, TX);
        let mut count = || std::iter::from_fn(|| bench.driver.used(TX)).count();
        assert_eq!(count(), TX_BUDGET);
        while bench.turn() {}
        let rest = std::iter::from_fn(|| bench.driver.used(TX)).count();
        assert_eq!(rest, TX_BUDGET + 1);
    });
}

fn delete_tap() {
    let status = std::process::Command::new("ip")
        .args(["link", "del", "dev", "t"])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_tap_that_was_deleted_ends_the_machine_by_name() {
    on_a_thread(|| {
        // Whether the guest gave buffers or not, or is not even there.
        for buffers in [50, 0] {
            let mut bench = bench(0);
            for _ in 0..buffers {
                bench.driver.push(RX, &[Part::Write(2000)]);
            }
            bench.driver.kick(&mut bench.net, RX);
            if buffers == 0 {
                bench.net.reset();
            }
            delete_tap();
            let mut events = [EpollEvent::empty(); 4];
            let ready = bench.epoll.wait(&mut events, 10_000u16).unwrap();
            assert_eq!(ready, 1, "the tap's end was not seen");
            let (token, flags) = (events[0].data() as u32, events[0].events());
            let net = &mut bench.net;
            let error = bench
                .driver
                .with(net, |net, io| net.host_ready(token, flags, io))
                .unwrap_err();
            assert_eq!(error.to_string(), "the tap t has gone");
        }
    });
}

#[test]
fn sending_to_a_tap_that_was_deleted_ends_the_machine_by_name() {
    on_a_thread(|| {
        let mut bench = bench(0);
        delete_tap();
        let packet = [vec![0; HEADER], frame(60, 1)].concat();
        bench.driver.push(TX, &[Part::Read(&packet)]);
        let net = &mut bench.net;
        let kicked = bench.driver.with(net, |net, io| net.kicked(TX, io));
        assert_eq!(kicked.unwrap_err().to_string(), "the tap t has gone");
    });
}

/// Sends VQ_PAIRS_SET to the control queue; the answer.
fn set_pairs(bench: &mut Bench, pairs: u16) -> u8 {
    command(bench, &[&[4, 0][..], &pairs.to_le_bytes()].concat())
}

fn command(bench: &mut Bench, command: &[u8]) -> u8 {
    let control = bench.net.control_queue().unwrap();
    let chain = bench
        .driver
        .push(control, &[Part::Read(command), Part::Write(1)]);
    bench.driver.kick(&mut bench.net, control);
    assert!(bench.driver.used(control).is_some());
    bench.driver.read(&chain, 1)[0]
}

#[test]
fn pairs_are_used_once_the_driver_asks_for_them() {
    on_a_thread(|| {
        let mut bench = bench_with_queues(3);
        let mut config = [0; 2];
        bench.net.read_config(8, &mut config);
        assert_eq!(config, [3, 0]);
        assert_eq!(bench.net.queue_sizes().len(), 7);
        assert_eq!(bench.net.control_queue(), Some(6));

        // Filled before they are in use.
        let packet = [vec![0; HEADER], frame(80, 1)].concat();
        bench.driver.push(5, &[Part::Read(&packet)]);
        bench.driver.kick(&mut bench.net, 5);
        assert!(bench.driver.used(5).is_none());
        assert_eq!(set_pairs(&mut bench, 3), 0);
        assert_eq!(bench.net.state().active_pairs, 3);
        bench.turn();
        assert!(bench.driver.used(5).is_some());

        for (wrong, what) in [
            (vec![4, 0, 0, 0], "no pair"),
            (vec![4, 0, 4, 0], "more pairs than there are"),
            (vec![4, 1, 1, 0], "another command"),
            (vec![0, 0, 1, 0], "another class"),
            (vec![4, 0, 1], "too short"),
        ] {
            assert_eq!(command(&mut bench, &wrong), 1, "{what}");
        }
        assert_eq!(bench.net.state().active_pairs, 3);
        bench.net.reset();
        assert_eq!(bench.net.state().active_pairs, 1);
    });
}

#[test]
fn packets_reach_whichever_pair_the_host_chooses() {
    on_a_thread(|| {
        let mut bench = bench_with_queues(2);
        for pairs in [1, 2, 1, 2] {
            assert_eq!(set_pairs(&mut bench, pairs), 0);
            for queue in [0, 2] {
                for _ in 0..80 {
                    bench.driver.push(queue, &[Part::Write(1000)]);
                }
                bench.driver.kick(&mut bench.net, queue);
            }
            bench.send(&frame(100, pairs as u8));
            let deadline = Instant::now() + Duration::from_secs(10);
            let mut used = 0;
            while used == 0 {
                assert!(Instant::now() < deadline, "nothing received");
                bench.turn();
                used = [0, 2]
                    .map(|q| bench.driver.used(q))
                    .iter()
                    .flatten()
                    .count();
            }
        }
    });
}

#[test]
fn one_descriptor_means_no_control_queue() {
    on_a_thread(|| {
        let bench = bench(ALL);
        let several = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
        assert_eq!(bench.net.features() & several, 0);
        assert_eq!(bench.net.queue_sizes(), [256, 256]);
        assert_eq!(bench.net.control_queue(), None);
    });
}

#[test]
fn queues_that_do_not_belong_together_are_refused() {
    on_a_thread(|| {
        let refused = |taps| Net::new(taps, MAC, None).err().unwrap().to_string();
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let multi = TAP_FLAGS | libc::IFF_MULTI_QUEUE;
        assert!(refused(vec![]).starts_with("0 descriptors"));
        let two = vec![tun(b'a', multi).0, tun(b'b', multi).0];
        assert_eq!(refused(two), "queues of two taps, a and b");
        let single = vec![tun(b'a', multi).0, tun(b'c', TAP_FLAGS).0];
        assert!(refused(single).contains("c has none"));
    });
}

#[test]
fn offloads_are_offered_as_the_tap_has_them() {
    on_a_thread(|| {
        let bench = bench(ALL);
        let has = |bit: u32| bench.net.features() & 1 << bit != 0;
        assert!(has(VIRTIO_NET_F_CSUM) && has(VIRTIO_NET_F_GUEST_TSO6));
        assert_eq!(has(VIRTIO_NET_F_HOST_USO), bench.net.host.uso4);
        assert_eq!(has(VIRTIO_NET_F_GUEST_UFO), bench.net.host.ufo);
        let all = Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ..bench.net.host
        };
        assert_eq!(bench.net.host, all);
        bench.net.pairs[0].tap.set_offloads(all).unwrap();
    });
}

#[test]
fn a_tap_of_the_wrong_kind_is_refused() {
    on_a_thread(|| {
        let (tun, _) = tap(TAP_FLAGS & !libc::IFF_VNET_HDR);
        assert!(matches!(
            Net::new(vec![tun], MAC, None),
            Err(TapError::Flags { .. })
        ));
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(
            Net::new(vec![null], MAC, None),
            Err(TapError::NoTun(_))
        ));
    });
}

#[test]
fn the_configuration_names_address_and_mtu() {
    on_a_thread(|| {
        let bench = bench(ALL);
        let mut config = [0xff; 16];
        bench.net.read_config(0, &mut config);
        assert_eq!(config[..6], MAC);
        assert_eq!(config[10..12], 1400u16.to_le_bytes());
        assert_eq!(config[12..], [0; 4]);
    });
}
