//! A guest that breaks the rules hurts its own connections at most.

use std::io::ErrorKind;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{GUEST_CID, NEXT, WRITE};
use super::*;
use crate::devices::vsock::packet::{HEADER_LEN, HOST_CID};
use crate::devices::vsock::{MAX_RESETS, PACKETS_PER_TURN};

const SEQPACKET: u16 = 2;
const SCRATCH: u64 = 0x10_0000;

#[test]
fn more_bytes_than_credit_reset_the_connection() {
    let (mut driver, end, ports) = connected_by_guest();
    let chunk = vec![b'z'; 64 * 1024];
    let mut accepted = 0;
    // The host's end is never read: socket and buffer fill up.
    let reset = loop {
        driver.send_packet(driver.header(ports, op::RW), &chunk);
        driver.turn(Duration::ZERO);
        let reset =
            std::iter::from_fn(|| driver.packet_if_any()).any(|packet| packet.header.op == op::RST);
        if reset {
            break true;
        }
        accepted += chunk.len();
        assert!(accepted < 16 << 20, "no bound");
    };
    assert!(reset);
    // What was accepted before still arrives.
    let reader = std::thread::spawn(move || read_to_end(&end));
    while driver.device.table.len() > 0 {
        driver.turn(Duration::from_millis(5));
    }
    let got = reader.join().unwrap();
    assert_eq!(got.len(), accepted);
    assert!(got.iter().all(|&b| b == b'z'));
}

#[test]
fn a_packet_for_no_connection_is_reset_but_a_reset_is_not() {
    let mut driver = Driver::new();
    let ports = Ports { host: 7, guest: 8 };
    for kind in [
        op::RESPONSE,
        op::RW,
        op::SHUTDOWN,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        0,
        99,
    ] {
        driver.send(ports, kind);
        let answer = driver.packet();
        assert_eq!((answer.header.op, answer.ports()), (op::RST, ports));
    }
    driver.send(ports, op::RST);
    driver.settle();
    assert!(driver.packet_if_any().is_none());
}

#[test]
fn a_broken_rule_on_a_connection_resets_it() {
    type Break = fn(Header) -> Header;
    let rules: [(&str, Break); 4] = [
        ("a second request", |h| Header {
            op: op::REQUEST,
            ..h
        }),
        ("a response to nothing", |h| Header {
            op: op::RESPONSE,
            ..h
        }),
        ("an unknown op", |h| Header { op: 77, ..h }),
        ("bytes that are not there", |h| Header {
            op: op::RW,
            len: 1,
            ..h
        }),
    ];
    for (what, rule) in rules {
        let (mut driver, end, ports) = connected_by_guest();
        let header = rule(driver.header(ports, op::RW));
        driver.offer_packet(&header, &[]);
        driver.kick(TX);
        assert_eq!(driver.packet().header.op, op::RST, "{what}");
        assert_eq!(read_to_end(&end), b"", "{what}");
        assert_eq!(driver.device.table.len(), 0, "{what}");
    }
}

#[test]
fn bytes_after_the_guests_own_shutdown_reset_the_connection() {
    let (mut driver, end, ports) = connected_by_guest();
    let close = Header {
        flags: SHUTDOWN_SEND,
        ..driver.header(ports, op::SHUTDOWN)
    };
    driver.send_packet(close, &[]);
    driver.send_packet(driver.header(ports, op::RW), b"more");
    assert_eq!(driver.packet().header.op, op::RST);
    assert_eq!(read_to_end(&end), b"");
}

#[test]
fn another_socket_type_is_refused_in_its_own_type() {
    let mut driver = Driver::new();
    let ports = Ports { host: 2, guest: 9 };
    let header = Header {
        kind: SEQPACKET,
        ..driver.header(ports, op::REQUEST)
    };
    driver.send_packet(header, &[]);
    let answer = driver.packet().header;
    assert_eq!((answer.op, answer.kind), (op::RST, SEQPACKET));
}

#[test]
fn packets_with_other_addresses_are_dropped() {
    let (mut driver, _end, ports) = connected_by_guest();
    let good = driver.header(ports, op::RST);
    for bad in [
        Header {
            src_cid: u64::from(GUEST_CID) + 1,
            ..good
        },
        Header {
            dst_cid: HOST_CID + 1,
            ..good
        },
    ] {
        driver.send_packet(bad, &[]);
    }
    driver.settle();
    assert!(driver.packet_if_any().is_none());
    assert_eq!(driver.device.table.len(), 1);
}

#[test]
fn malformed_chains_are_returned_and_the_device_goes_on() {
    let (mut driver, mut end, ports) = connected_by_guest();
    let header = Header {
        len: 4,
        ..driver.header(ports, op::RW)
    };
    driver
        .mem
        .write_slice(&header.encode(), GuestAddress(SCRATCH))
        .unwrap();
    let header_len = HEADER_LEN as u32;
    let before = driver.sent();

    // Shorter than a header; empty; outside memory; all writable; a loop.
    driver.describe(TX, 100, SCRATCH, header_len - 1, 0, 0);
    driver.offer(TX, 100);
    driver.describe(TX, 101, SCRATCH, 0, 0, 0);
    driver.offer(TX, 101);
    driver.describe(TX, 102, u64::MAX - 10, header_len, 0, 0);
    driver.offer(TX, 102);
    driver.describe(TX, 103, SCRATCH, header_len, WRITE, 0);
    driver.offer(TX, 103);
    driver.describe(TX, 104, SCRATCH, 1, NEXT, 104);
    driver.offer(TX, 104);
    driver.kick(TX);
    assert_eq!(driver.sent(), before + 5);
    assert_eq!(
        driver.device.table.len(),
        1,
        "nothing was taken for a packet"
    );

    // A header in three pieces and a payload in two are fine.
    driver
        .mem
        .write_slice(b"fine", GuestAddress(SCRATCH + 64))
        .unwrap();
    driver.describe(TX, 110, SCRATCH, 10, NEXT, 111);
    driver.describe(TX, 111, SCRATCH + 10, 30, NEXT, 112);
    driver.describe(TX, 112, SCRATCH + 40, 4, NEXT, 113);
    driver.describe(TX, 113, SCRATCH + 64, 1, NEXT, 114);
    driver.describe(TX, 114, SCRATCH + 65, 3, 0, 0);
    driver.offer(TX, 110);
    driver.kick(TX);
    let mut got = [0; 4];
    end.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"fine");
}

#[test]
fn receive_buffers_that_hold_no_packet_are_returned_unused() {
    let mut driver =
        Driver::without_buffers(Box::new(|_| Err(ErrorKind::ConnectionRefused.into())));
    driver.refill = false;
    let at = Driver::rx_buffer_address(0);
    driver.describe(RX, 0, at, HEADER_LEN as u32 - 1, WRITE, 0);
    driver.offer(RX, 0);
    driver.describe(RX, 1, u64::MAX - 4096, 4096, WRITE, 0);
    driver.offer(RX, 1);
    driver.describe(RX, 2, at, 4096, 0, 0);
    driver.offer(RX, 2);
    driver.find_buffers();
    driver.give_buffers(1);
    driver.send(Ports { host: 1, guest: 1 }, op::RW);
    assert_eq!(driver.packet().header.op, op::RST);
}

#[test]
fn a_ring_that_cannot_be_believed_ends_the_machine() {
    let mut driver = Driver::new();
    driver.offer(TX, 4000);
    let error = driver.try_kick(TX).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
}

#[test]
fn resets_to_a_guest_that_takes_none_are_bounded() {
    let mut driver =
        Driver::without_buffers(Box::new(|_| Err(ErrorKind::ConnectionRefused.into())));
    for guest in 0..MAX_RESETS as u32 + 100 {
        driver.send(Ports { host: 1, guest }, op::REQUEST);
    }
    assert_eq!(driver.device.resets.len(), MAX_RESETS);
    driver.find_buffers();
    driver.give_buffers(usize::MAX);
    driver.kick(RX);
    for guest in 0..MAX_RESETS as u32 {
        assert_eq!(driver.packet().ports().guest, guest);
    }
}

#[test]
fn a_flood_of_packets_leaves_the_host_its_turn_and_is_handled_to_the_end() {
    let (mut driver, mut end, ports) = connected_by_guest();
    let header = driver.header(ports, op::CREDIT_UPDATE).encode();
    let before = driver.sent();
    driver
        .mem
        .write_slice(&header, GuestAddress(SCRATCH))
        .unwrap();
    for index in 0..120 {
        driver.describe(TX, index, SCRATCH, HEADER_LEN as u32, 0, 0);
        driver.offer(TX, index);
    }
    end.write_all(b"still here").unwrap();
    driver.kick(TX);
    let turn = PACKETS_PER_TURN as u16;
    assert_eq!(driver.sent(), before + turn, "one turn's worth");
    assert_eq!(driver.packet().data, b"still here");
    driver.settle();
    assert_eq!(driver.sent(), before + 120);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever headers come, the device neither panics nor fails nor spins.
    #[test]
    fn any_sequence_of_packets_is_survived(
        packets in prop::collection::vec(
            (0u16..10, 0u32..4, 0u32..3, 0u32..5, any::<u32>(), any::<u32>(), 0usize..300),
            1..60,
        )
    ) {
        let mut ends = Vec::new();
        let (sender, receiver) = mpsc::channel();
        let mut driver = Driver::answering(Box::new(move |port| {
            if port == 3 {
                return Err(ErrorKind::ConnectionRefused.into());
            }
            let (ours, theirs) = UnixStream::pair()?;
            sender.send(theirs).map_err(io::Error::other)?;
            Ok(ours)
        }));
        for (kind, host, guest, flags, buf_alloc, fwd_cnt, len) in packets {
            let ports = Ports { host, guest };
            let header = Header {
                flags,
                buf_alloc,
                fwd_cnt,
                ..driver.header(ports, kind)
            };
            driver.send_packet(header, &vec![7; len]);
            for mut end in receiver.try_iter() {
                end.set_nonblocking(true).unwrap();
                end.write_all(b"from the host").unwrap();
                ends.push(end);
            }
            if len % 7 == 0 {
                ends.pop();
            }
            driver.turn(Duration::ZERO);
        }
        driver.settle();
        while driver.packet_if_any().is_some() {}
        prop_assert!(driver.device.table.len() <= 12);
    }
}
