//! A guest whose NIC is in the hands of the test.

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{Netns, read_interface};

/// The virtio-net header before each frame, 10 bytes unless set otherwise.
const VNET_HEADER: usize = 10;

pub(crate) const ARP: u16 = 0x0806;
pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const IPV6: u16 = 0x86dd;

pub(crate) struct Guest {
    pub(crate) tap: File,
    tap_mac: [u8; 6],
    pub(crate) mac: [u8; 6],
}

impl Guest {
    /// On a queue of `tap0` of `netns`.
    pub(crate) async fn on(netns: &Netns, queue: OwnedFd, mac: [u8; 6]) -> Self {
        Self {
            tap: queue.into(),
            tap_mac: read_interface(netns, "tap0").await.unwrap().mac,
            mac,
        }
    }

    pub(crate) fn send(&mut self, to: [u8; 6], ethertype: u16, payload: &[u8]) {
        let frame = frame(to, self.mac, ethertype, payload);
        self.send_frame(&frame).unwrap();
    }

    pub(crate) fn send_frame(&mut self, frame: &[u8]) -> io::Result<()> {
        let packet = [&[0; VNET_HEADER], frame].concat();
        assert_eq!(self.tap.write(&packet)?, packet.len());
        Ok(())
    }

    /// The next frame that `wanted` accepts of (ethertype, payload).
    pub(crate) fn receive(&mut self, wanted: impl Fn(u16, &[u8]) -> bool) -> Option<Vec<u8>> {
        // The bridge first makes sure of its own IPv6 address for a second.
        let deadline = Instant::now() + Duration::from_secs(8);
        let mut packet = vec![0; 65536];
        loop {
            match self.tap.read(&mut packet) {
                Ok(length) => {
                    let frame = &packet[VNET_HEADER..length];
                    let ethertype = u16::from_be_bytes([frame[12], frame[13]]);
                    assert_ne!(frame[6..12], self.tap_mac, "the tap speaks itself");
                    if wanted(ethertype, &frame[14..]) {
                        return Some(frame[14..].to_vec());
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let mut fds = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
                    let left = PollTimeout::try_from(left).unwrap();
                    if poll(&mut fds, left).unwrap() == 0 {
                        return None;
                    }
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

pub(crate) fn frame(to: [u8; 6], from: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&to, &from, &ethertype.to_be_bytes()[..], payload].concat()
}

pub(crate) fn arp(operation: u16, mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    packet.extend(mac);
    packet.extend(from.octets());
    packet.extend([0; 6]);
    packet.extend(to.octets());
    packet
}
