//! The device as its guest and its host clients see it.

mod bulk;
mod driver;
mod hostile;

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use super::packet::{Header, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::{BUFFER_FEW, RX, TX};
use crate::devices::Device;
use crate::filter::{Role, confine};
use driver::{Driver, PATIENCE};

const PORT: u32 = 1024;

/// A connection that the host opened and the guest accepted.
fn connected(driver: &mut Driver) -> (UnixStream, Ports) {
    let (mut client, request) = driver.dial_port(PORT);
    assert_eq!(request.header.op, op::REQUEST);
    assert_eq!(request.header.dst_port, PORT);
    let ports = request.ports();
    driver.send(ports, op::RESPONSE);
    let ok = format!("OK {}\n", ports.host);
    let mut line = vec![0; ok.len()];
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.read_exact(&mut line).unwrap();
    assert_eq!(line, ok.as_bytes());
    (client, ports)
}

/// A connection that the guest opened; the host's end of it.
fn connected_by_guest() -> (Driver, UnixStream, Ports) {
    let (sender, ends) = mpsc::channel();
    let mut driver = Driver::answering(Box::new(move |port| {
        if port != 2 {
            return Err(ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        sender.send(theirs).map_err(io::Error::other)?;
        Ok(ours)
    }));
    let ports = Ports {
        host: 2,
        guest: 5000,
    };
    driver.send(ports, op::REQUEST);
    let response = driver.packet();
    assert_eq!(response.header.op, op::RESPONSE);
    assert_eq!(response.ports(), ports);
    assert_eq!(response.header.buf_alloc, BUFFER_FEW);
    let end = ends.recv().unwrap();
    end.set_read_timeout(Some(PATIENCE)).unwrap();
    (driver, end, ports)
}

fn read_to_end(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_host_client_reaches_a_port_of_the_guest() {
    let mut driver = Driver::new();
    let (mut client, ports) = connected(&mut driver);

    client.write_all(b"ping").unwrap();
    let data = driver.packet();
    assert_eq!((data.header.op, &data.data[..]), (op::RW, &b"ping"[..]));

    driver.send_packet(driver.header(ports, op::RW), b"pong");
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");
}

#[test]
fn bytes_sent_right_behind_the_greeting_reach_the_guest() {
    let mut driver = Driver::new();
    let mut client = driver.dial();
    client.write_all(b"CONNECT 9\nearly").unwrap();
    let request = driver.packet();
    assert_eq!(request.header.op, op::REQUEST);
    driver.send(request.ports(), op::RESPONSE);
    assert_eq!(driver.packet().data, b"early");
}

#[test]
fn a_port_that_nobody_serves_closes_the_client() {
    let mut driver = Driver::new();
    let (client, request) = driver.dial_port(PORT);
    driver.send(request.ports(), op::RST);
    assert_eq!(read_to_end(&client), b"");
    assert!(driver.packet_if_any().is_none(), "a RST is not answered");
}

#[test]
fn a_client_that_does_not_say_connect_is_closed() {
    let mut driver = Driver::new();
    let mut client = driver.dial();
    client.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    driver.settle();
    // What it wrote was not read: the close may be a reset.
    let end = client.read(&mut [0; 16]);
    assert!(matches!(end, Ok(0)) || end.unwrap_err().kind() == ErrorKind::ConnectionReset);
}

#[test]
fn the_guest_reaches_a_port_of_the_host() {
    let (mut driver, mut end, ports) = connected_by_guest();
    driver.send_packet(driver.header(ports, op::RW), b"ready");
    let mut got = [0; 5];
    end.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"ready");
    end.write_all(b"fine").unwrap();
    assert_eq!(driver.packet().data, b"fine");
}

#[test]
fn a_host_port_that_nobody_serves_is_refused() {
    let (mut driver, _end, _) = connected_by_guest();
    let ports = Ports {
        host: 3,
        guest: 5001,
    };
    driver.send(ports, op::REQUEST);
    let answer = driver.packet();
    assert_eq!(answer.header.op, op::RST);
    assert_eq!(answer.ports(), ports);
}

#[test]
fn the_host_half_closes_and_still_reads() {
    let mut driver = Driver::new();
    let (mut client, ports) = connected(&mut driver);
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();

    assert_eq!(driver.packet().data, b"last words");
    let end = driver.packet().header;
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_SEND));

    driver.send_packet(driver.header(ports, op::RW), b"answer");
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    let close = Header {
        flags: both,
        ..driver.header(ports, op::SHUTDOWN)
    };
    driver.send_packet(close, &[]);
    assert_eq!(read_to_end(&client), b"answer");
    assert_eq!(driver.packet().header.op, op::RST, "the close is confirmed");
    driver.settle();
    assert_eq!(driver.device.table.len(), 0);
}

#[test]
fn the_guest_half_closes_and_still_reads() {
    let (mut driver, mut end, ports) = connected_by_guest();
    driver.send_packet(driver.header(ports, op::RW), b"all of the log");
    let close = Header {
        flags: SHUTDOWN_SEND,
        ..driver.header(ports, op::SHUTDOWN)
    };
    driver.send_packet(close, &[]);
    assert_eq!(read_to_end(&end), b"all of the log");

    end.write_all(b"taken").unwrap();
    assert_eq!(driver.packet().data, b"taken");
    drop(end);
    let mut flags = 0;
    while flags != SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
        let packet = driver.packet().header;
        assert_eq!(packet.op, op::SHUTDOWN);
        flags = packet.flags;
    }
    driver.send(ports, op::RST);
    assert_eq!(driver.device.table.len(), 0);
}

#[test]
fn a_guest_that_reads_no_more_fails_the_hosts_writes() {
    let (mut driver, mut end, ports) = connected_by_guest();
    let close = Header {
        flags: SHUTDOWN_RECEIVE,
        ..driver.header(ports, op::SHUTDOWN)
    };
    driver.send_packet(close, &[]);
    assert_eq!(
        end.write_all(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    driver.send_packet(driver.header(ports, op::RW), b"but it still sends");
    let mut got = [0; 18];
    end.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"but it still sends");
}

#[test]
fn a_client_that_vanishes_while_connecting_resets_the_guest() {
    let mut driver = Driver::new();
    let (client, request) = driver.dial_port(PORT);
    drop(client);
    let end = driver.packet();
    assert_eq!(end.header.op, op::RST);
    assert_eq!(end.ports(), request.ports());
    // The guest's late answer meets no connection.
    driver.send(request.ports(), op::RESPONSE);
    assert_eq!(driver.packet().header.op, op::RST);
}

#[test]
fn a_client_that_vanishes_ends_the_connection_after_its_bytes() {
    let mut driver = Driver::new();
    let (mut client, ports) = connected(&mut driver);
    client.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(driver.packet().data, b"bye");
    let mut flags = 0;
    while flags != SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
        let end = driver.packet().header;
        assert_eq!(end.op, op::SHUTDOWN);
        flags = end.flags;
    }
    // Bytes that cross it are dropped without a word.
    driver.send_packet(driver.header(ports, op::RW), b"crossing");
    driver.settle();
    assert!(driver.packet_if_any().is_none());
    driver.send(ports, op::RST);
    assert_eq!(driver.device.table.len(), 0);
}

#[test]
fn bytes_left_unread_by_a_vanished_client_do_not_cost_its_own() {
    let mut driver = Driver::new();
    let (mut client, ports) = connected(&mut driver);
    driver.send_packet(driver.header(ports, op::RW), b"never read");
    client.write_all(b"said before").unwrap();
    drop(client);
    assert_eq!(driver.packet().data, b"said before");
    assert_eq!(driver.packet().header.op, op::SHUTDOWN);
}

#[test]
fn bytes_of_a_guest_that_reset_still_reach_a_slow_host() {
    let (mut driver, end, ports) = connected_by_guest();
    let mut expected = Vec::new();
    // More than the socket holds, within the credit beyond it.
    loop {
        let chunk = vec![expected.len() as u8; 32 * 1024];
        driver.send_packet(driver.header(ports, op::RW), &chunk);
        expected.extend(chunk);
        let slot = driver.device.table.find(ports).unwrap();
        if !driver.device.table[slot].backlog_is_empty() {
            break;
        }
    }
    driver.send(ports, op::RST);
    assert!(
        driver.device.table.find(ports).is_none(),
        "the ports are free"
    );
    let reader = std::thread::spawn(move || read_to_end(&end));
    while driver.device.table.len() > 0 {
        driver.turn(Duration::from_millis(5));
    }
    assert!(reader.join().unwrap() == expected);
}

#[test]
fn a_client_waits_for_a_guest_that_has_no_driver_yet() {
    let mut driver =
        Driver::without_buffers(Box::new(|_| Err(ErrorKind::ConnectionRefused.into())));
    let mut client = driver.dial();
    client.write_all(b"CONNECT 1024\n").unwrap();
    driver.settle();
    // The driver's first act is a reset.
    driver.device.reset();
    driver.find_buffers();
    driver.give_buffers(usize::MAX);
    driver.kick(RX);
    assert_eq!(driver.packet().header.op, op::REQUEST);
}

#[test]
fn a_reset_closes_the_connections_of_the_guest() {
    let (mut driver, end, ports) = connected_by_guest();
    let (client, _) = connected(&mut driver);
    driver.device.reset();
    assert_eq!(read_to_end(&end), b"");
    assert_eq!(read_to_end(&client), b"");
    assert_eq!(driver.device.table.len(), 0);
    driver.send(ports, op::RW);
    assert_eq!(driver.packet().header.op, op::RST);
}

#[test]
fn bytes_taken_before_a_reset_still_reach_the_host() {
    let (mut driver, end, ports) = connected_by_guest();
    let mut sent = 0;
    let slot = driver.device.table.find(ports).unwrap();
    while driver.device.table[slot].backlog_is_empty() {
        driver.send_packet(driver.header(ports, op::RW), &[b'k'; 32 * 1024]);
        sent += 32 * 1024;
    }
    // As on `kvm`.
    let device = &mut driver.device;
    let reset = move || {
        confine(Role::Vcpu).unwrap();
        device.reset();
        device.reset();
    };
    std::thread::scope(|scope| scope.spawn(reset).join().unwrap());
    let reader = std::thread::spawn(move || read_to_end(&end));
    while driver.device.table.len() > 0 {
        driver.turn(Duration::from_millis(5));
    }
    assert_eq!(reader.join().unwrap().len(), sent);
}

#[test]
fn interrupts_come_when_the_driver_asked_for_them() {
    let (mut driver, mut end, ports) = connected_by_guest();
    let before = (driver.irq.count(RX), driver.irq.count(TX));
    // Only the tenth further packet is of interest.
    driver.set_used_event(TX, driver.sent().wrapping_add(9));
    for _ in 0..9 {
        driver.send_packet(driver.header(ports, op::RW), b"x");
    }
    assert_eq!(driver.irq.count(TX), before.1);
    driver.send_packet(driver.header(ports, op::RW), b"x");
    assert_eq!(driver.irq.count(TX), before.1 + 1);

    driver.set_used_event(RX, 1);
    end.write_all(b"y").unwrap();
    assert_eq!(driver.packet().data, b"y");
    assert_eq!(driver.irq.count(RX), before.0 + 1);
}

#[test]
fn the_config_space_is_the_guests_cid() {
    let driver = Driver::new();
    let mut config = [0xff; 12];
    driver.device.read_config(0, &mut config);
    assert_eq!(config, [42, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    driver.device.read_config(usize::MAX, &mut config);
    assert_eq!(config, [0; 12]);
}
