//! The device's guest side: packets from the transmit queue and onto the
//! receive queue.

use std::io;

use virtio_queue::QueueT;

use super::connection::{Connection, Phase, Pumped};
use super::packet::{HEADER_LEN, HOST_CID, Header, Ports, TYPE_STREAM, op};
use super::rx::Rx;
use super::{MAX_CONNECTIONS, MAX_RESETS, PACKETS_PER_TURN, RX, Reset, TX, Vsock};
use crate::devices::Io;
use crate::devices::iov::{self, Iov};

impl Vsock {
    pub(super) fn reset_peer(&mut self, ports: Ports, kind: u16) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(Reset { ports, kind });
        } else if !self.resets_lost {
            self.resets_lost = true;
            tracing::warn!("vsock: the guest takes no packets; resets are being lost");
        }
    }

    /// Sends all that waits for the guest, as far as it has buffers.
    pub(super) fn send_pending(&mut self, io: &mut Io<'_>) -> io::Result<()> {
        let mut rx = Rx::new(io.mem, &mut io.queues[RX], self.state.guest_cid);
        while let Some(reset) = self.resets.front() {
            let header = Header {
                op: op::RST,
                kind: reset.kind,
                ..Header::default()
            };
            if !rx.send(reset.ports, header)? {
                return rx.finish(RX, io.irq);
            }
            self.resets.pop_front();
        }
        while let Some(slot) = self.table.next_pending() {
            let pumped = self.table[slot].pump(&mut rx)?;
            self.watch(slot)?;
            if pumped == Pumped::Starved {
                self.table.enqueue(slot);
                break;
            }
        }
        rx.finish(RX, io.irq)
    }

    /// Handles packets of the guest, up to one turn's worth.
    pub(super) fn receive_packets(&mut self, io: &mut Io<'_>) -> io::Result<()> {
        if !io.queues[TX].ready() {
            return Ok(());
        }
        let before = io.queues[TX].next_used();
        let mut left = PACKETS_PER_TURN;
        while let Some(chain) = io.next_chain(TX)? {
            let head = chain.head_index();
            match iov::split(chain, io.mem) {
                Ok((packet, _)) => self.packet(packet)?,
                Err(e) => tracing::debug!(error = %e, "vsock: a packet was dropped"),
            }
            io.give_back(TX, head, 0)?;
            left -= 1;
            if left == 0 {
                self.again.ring()?;
                break;
            }
        }
        io.notify_since(TX, before)
    }

    pub(super) fn packet(&mut self, mut packet: Iov<'_>) -> io::Result<()> {
        let Some(bytes) = packet.take_bytes::<HEADER_LEN>() else {
            tracing::debug!("vsock: a packet shorter than its header was dropped");
            return Ok(());
        };
        let header = Header::decode(&bytes);
        if header.src_cid != self.state.guest_cid || header.dst_cid != HOST_CID {
            // No such host: nobody could answer (virtio 1.2 §5.10.6.4.1).
            return Ok(());
        }
        let ports = header.ports();
        if header.kind != TYPE_STREAM {
            if header.op != op::RST {
                self.reset_peer(ports, header.kind);
            }
            return Ok(());
        }
        let Some(slot) = self.table.find(ports) else {
            match header.op {
                op::RST => {}
                op::REQUEST => self.guest_connects(ports, &header)?,
                _ => self.reset_peer(ports, TYPE_STREAM),
            }
            return Ok(());
        };
        self.table[slot].update_credit(&header);
        let understood = self.connection_packet(slot, &header, packet)?;
        if !understood {
            self.reset_peer(ports, TYPE_STREAM);
            return self.retire(slot);
        }
        self.table.enqueue(slot);
        self.watch(slot)
    }

    /// False: the guest broke the rules of its connection.
    pub(super) fn connection_packet(
        &mut self,
        slot: usize,
        header: &Header,
        mut payload: Iov<'_>,
    ) -> io::Result<bool> {
        let connection = &mut self.table[slot];
        let open = matches!(connection.phase, Phase::Open);
        match header.op {
            op::RST => self.retire(slot)?,
            op::RESPONSE if !open && !connection.unknown_to_guest() => {
                if connection.accepted().is_err() {
                    return Ok(false);
                }
            }
            op::RW if open => {
                // What comes behind it is padding.
                payload.truncate(header.len as usize);
                return Ok(payload.len() == header.len as usize
                    && connection.take_payload(&payload).is_ok());
            }
            op::SHUTDOWN if open => {
                connection.guest_shutdown(header.flags);
                self.end_if_finished(slot)?;
            }
            op::CREDIT_UPDATE if open => {}
            op::CREDIT_REQUEST if open => connection.credit_update_requested(),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Answers a SHUTDOWN of both directions once nothing is left to deliver.
    pub(super) fn end_if_finished(&mut self, slot: usize) -> io::Result<()> {
        let connection = &self.table[slot];
        if matches!(connection.phase, Phase::Open) && connection.is_finished() {
            let ports = connection.ports;
            self.reset_peer(ports, TYPE_STREAM);
            self.remove(slot)?;
        }
        Ok(())
    }

    pub(super) fn guest_connects(&mut self, ports: Ports, header: &Header) -> io::Result<()> {
        let stream = if self.table.len() < MAX_CONNECTIONS {
            self.ports.connect(ports.host)
        } else {
            Err(io::Error::other("too many connections"))
        };
        match stream {
            Ok(stream) => {
                let mut new = Connection::from_guest(stream, ports, self.buffer_for_new());
                new.update_credit(header);
                let slot = self.table.insert(new);
                self.table.enqueue(slot);
                self.watch(slot)
            }
            Err(e) => {
                tracing::debug!(port = ports.host, error = %e, "vsock: a guest's connection was refused");
                self.reset_peer(ports, TYPE_STREAM);
                Ok(())
            }
        }
    }
}
