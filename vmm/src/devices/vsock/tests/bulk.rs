//! Many bytes, many connections, slow readers.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::devices::vsock::connection::Phase;

/// Bytes that repeat with no power of two.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i % 251) ^ (i / 65_521)) as u8).collect()
}

/// The guest's end of one connection, as Linux keeps it.
struct GuestEnd {
    ports: Ports,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    sent: u32,
    taken: u32,
    told: u32,
    /// Bytes received and not read by the program.
    received: Vec<u8>,
    ended: bool,
}

impl GuestEnd {
    fn new(ports: Ports, response: &Header) -> Self {
        Self {
            ports,
            peer_buf_alloc: response.buf_alloc,
            peer_fwd_cnt: response.fwd_cnt,
            sent: 0,
            taken: 0,
            told: 0,
            received: Vec::new(),
            ended: false,
        }
    }

    fn header(&mut self, driver: &Driver, op: u16) -> Header {
        self.told = self.taken;
        Header {
            fwd_cnt: self.taken,
            ..driver.header(self.ports, op)
        }
    }

    /// Sends as much as credit allows, in packets of at most 64 KiB.
    fn send(&mut self, driver: &mut Driver, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let credit = self.peer_buf_alloc - self.sent.wrapping_sub(self.peer_fwd_cnt);
            let n = (bytes.len() - done).min(credit as usize).min(65_536);
            if n == 0 {
                break;
            }
            let header = self.header(driver, op::RW);
            driver.send_packet(header, &bytes[done..done + n]);
            self.sent = self.sent.wrapping_add(n as u32);
            done += n;
            self.take_packets(driver);
        }
        done
    }

    fn take_packets(&mut self, driver: &mut Driver) {
        while let Some(packet) = driver.packet_if_any() {
            self.take(driver, packet);
        }
    }

    fn take(&mut self, driver: &mut Driver, packet: driver::Packet) {
        assert_eq!(packet.ports(), self.ports);
        self.peer_buf_alloc = packet.header.buf_alloc;
        self.peer_fwd_cnt = packet.header.fwd_cnt;
        match packet.header.op {
            op::RW => {
                self.received.extend(packet.data);
                let held = (self.received.len() as u32).wrapping_sub(self.told);
                assert!(held <= driver.buf_alloc, "the device overran our credit");
            }
            op::SHUTDOWN => self.ended = true,
            op::CREDIT_REQUEST => {
                let header = self.header(driver, op::CREDIT_UPDATE);
                driver.send_packet(header, &[]);
            }
            op::CREDIT_UPDATE => {}
            other => panic!("unexpected op {other}"),
        }
    }

    /// The program reads all there is.
    fn read(&mut self, driver: &mut Driver) {
        self.taken = self.received.len() as u32;
        if self.taken.wrapping_sub(self.told) > driver.buf_alloc / 2 {
            let header = self.header(driver, op::CREDIT_UPDATE);
            driver.send_packet(header, &[]);
        }
    }
}

fn established(driver: &mut Driver) -> (UnixStream, GuestEnd) {
    let (mut client, request) = driver.dial_port(PORT);
    let guest = GuestEnd::new(request.ports(), &request.header);
    driver.send(guest.ports, op::RESPONSE);
    let mut byte = [0];
    while byte != *b"\n" {
        client.read_exact(&mut byte).unwrap();
    }
    (client, guest)
}

#[test]
fn megabytes_are_echoed_exactly_past_a_slow_reader() {
    let mut driver = Driver::new();
    driver.buf_alloc = 64 * 1024;
    let (client, mut guest) = established(&mut driver);
    let sent = pattern(6 << 20);
    let echo = thread::spawn(move || {
        let mut buffer = vec![0; 9_973];
        let mut reads = 0;
        loop {
            let n = (&client).read(&mut buffer).unwrap();
            if n == 0 {
                client.shutdown(Shutdown::Write).unwrap();
                return;
            }
            (&client).write_all(&buffer[..n]).unwrap();
            reads += 1;
            if reads % 64 == 0 {
                thread::yield_now();
            }
        }
    });
    let start = Instant::now();
    let mut done = 0;
    let mut closed = false;
    while !guest.ended {
        assert!(start.elapsed() < PATIENCE, "stuck at {done}");
        done += guest.send(&mut driver, &sent[done..]);
        if done == sent.len() && !closed {
            closed = true;
            let header = Header {
                flags: SHUTDOWN_SEND,
                ..guest.header(&driver, op::SHUTDOWN)
            };
            driver.send_packet(header, &[]);
        }
        driver.turn(Duration::from_millis(1));
        guest.take_packets(&mut driver);
        guest.read(&mut driver);
    }
    echo.join().unwrap();
    assert!(guest.received == sent, "echoed bytes differ");
}

#[test]
fn a_reader_that_stops_holds_the_guest_within_its_credit() {
    let mut driver = Driver::new();
    let (client, mut guest) = established(&mut driver);
    let sent = pattern(4 << 20);
    let mut done = 0;
    // Until neither the socket nor the buffer takes more.
    loop {
        let n = guest.send(&mut driver, &sent[done..]);
        driver.settle();
        guest.take_packets(&mut driver);
        if n == 0 {
            break;
        }
        done += n;
    }
    assert!(done < sent.len(), "the device takes without bound");
    assert_eq!(driver.turn(Duration::ZERO), 0, "and it is at rest");

    let reader = thread::spawn(move || read_to_end(&client));
    let start = Instant::now();
    while done < sent.len() {
        assert!(start.elapsed() < PATIENCE);
        driver.turn(Duration::from_millis(1));
        guest.take_packets(&mut driver);
        done += guest.send(&mut driver, &sent[done..]);
    }
    let header = Header {
        flags: SHUTDOWN_SEND | SHUTDOWN_RECEIVE,
        ..guest.header(&driver, op::SHUTDOWN)
    };
    driver.send_packet(header, &[]);
    while driver.device.table.len() > 0 {
        driver.turn(Duration::from_millis(1));
    }
    assert!(reader.join().unwrap() == sent);
}

#[test]
fn a_guest_without_credit_or_buffers_costs_no_cpu_and_no_bytes() {
    let mut driver = Driver::new();
    driver.buf_alloc = 10_000;
    let (mut client, mut guest) = established(&mut driver);
    let sent = pattern(100_000);
    let writer = {
        let sent = sent.clone();
        thread::spawn(move || {
            client.write_all(&sent).unwrap();
            // Gone before the guest has read it: a hang-up that must wait.
        })
    };
    writer.join().unwrap();
    driver.settle();
    assert_eq!(driver.turn(Duration::ZERO), 0, "no credit: at rest");
    guest.take_packets(&mut driver);
    assert_eq!(guest.received.len(), 10_000);

    // Credit, but no buffers.
    driver.refill = false;
    driver.buf_alloc = 1 << 20;
    let header = guest.header(&driver, op::CREDIT_UPDATE);
    driver.send_packet(header, &[]);
    driver.settle();
    guest.take_packets(&mut driver);
    assert_eq!(driver.turn(Duration::ZERO), 0, "no buffers: at rest");

    let start = Instant::now();
    while !guest.ended {
        assert!(start.elapsed() < PATIENCE);
        driver.give_buffers(1);
        driver.kick(RX);
        driver.turn(Duration::ZERO);
        guest.take_packets(&mut driver);
    }
    assert!(guest.received == sent);
}

#[test]
fn two_thousand_connections_at_once() {
    let mut driver = Driver::new();
    let mut guests = HashMap::new();
    let mut clients = Vec::new();
    for i in 0..2000 {
        let (client, guest) = established(&mut driver);
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        guests.insert(guest.ports.host, guest);
        clients.push((i, client));
    }
    assert_eq!(driver.device.table.len(), 2000);
    for (i, client) in &mut clients {
        client.write_all(format!("hello {i}").as_bytes()).unwrap();
    }
    for _ in 0..2000 {
        let packet = driver.packet();
        assert_eq!(packet.header.op, op::RW);
        let guest = guests.get_mut(&packet.header.src_port).unwrap();
        let header = guest.header(&driver, op::RW);
        driver.send_packet(header, &packet.data);
    }
    for (i, client) in &mut clients {
        let expected = format!("hello {i}");
        let mut got = vec![0; expected.len()];
        client.read_exact(&mut got).unwrap();
        assert_eq!(got, expected.as_bytes());
    }
    drop(clients);
    let mut ended = HashMap::new();
    while ended.len() < 2000 {
        let packet = driver.packet();
        assert_eq!(packet.header.op, op::SHUTDOWN);
        if packet.header.flags == SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
            driver.send(packet.ports(), op::RST);
            ended.insert(packet.ports(), ());
        }
    }
    driver.settle();
    assert_eq!(driver.device.table.len(), 0);
}

#[test]
fn a_busy_connection_does_not_starve_another() {
    let mut driver = Driver::new();
    driver.buf_alloc = 64 << 20;
    let (busy, busy_guest) = established(&mut driver);
    let (mut quiet, quiet_guest) = established(&mut driver);
    let writer = thread::spawn(move || {
        let chunk = pattern(64 * 1024);
        // Ends when the device hangs up.
        while (&busy).write_all(&chunk).is_ok() {}
    });
    let mut before = 0;
    while before < 1 << 20 {
        before += driver.packet().data.len();
    }
    quiet.write_all(b"now").unwrap();
    let mut between = 0;
    loop {
        let packet = driver.packet();
        if packet.ports() == quiet_guest.ports {
            assert_eq!(packet.data, b"now");
            break;
        }
        assert_eq!(packet.ports(), busy_guest.ports);
        between += packet.data.len();
        assert!(between < 8 << 20, "starved");
    }
    driver.send(busy_guest.ports, op::RST);
    writer.join().unwrap();
}

#[test]
fn waiting_clients_are_bounded_and_the_oldest_goes() {
    let mut driver = Driver::new();
    let mut clients = Vec::new();
    for _ in 0..300 {
        clients.push(driver.dial());
        driver.turn(Duration::ZERO);
    }
    driver.settle();
    assert_eq!(driver.device.table.len(), super::super::MAX_GREETINGS);
    assert_eq!(read_to_end(&clients[0]), b"");
    let newest = clients.last_mut().unwrap();
    newest.write_all(b"CONNECT 5\n").unwrap();
    let request = driver.packet();
    assert_eq!(request.header.dst_port, 5);
    let slot = driver.device.table.find(request.ports()).unwrap();
    assert!(matches!(driver.device.table[slot].phase, Phase::Connecting));
}
