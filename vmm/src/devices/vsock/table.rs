//! The connections of a device, found by slot (epoll) or by ports (packets),
//! and which of them wait to send something to the guest.

use std::collections::{HashMap, VecDeque};
use std::ops::{Index, IndexMut};

use slab::Slab;

use super::connection::{Connection, Phase};
use super::packet::Ports;

/// Host ports given to connections that the host opens, reused in a circle.
const EPHEMERAL: std::ops::Range<u32> = 0x4000_0000..0x8000_0000;

pub(super) struct Table {
    slots: Slab<Connection>,
    by_ports: HashMap<Ports, usize>,
    /// Slots of connections whose `queued` is set, each once.
    pending: VecDeque<usize>,
    next_port: u32,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            slots: Slab::new(),
            by_ports: HashMap::new(),
            pending: VecDeque::new(),
            next_port: EPHEMERAL.start,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn get_mut(&mut self, slot: usize) -> Option<&mut Connection> {
        self.slots.get_mut(slot)
    }

    pub(super) fn find(&self, ports: Ports) -> Option<usize> {
        self.by_ports.get(&ports).copied()
    }

    /// A client that has no ports yet.
    pub(super) fn insert_unbound(&mut self, connection: Connection) -> usize {
        self.slots.insert(connection)
    }

    pub(super) fn insert(&mut self, connection: Connection) -> usize {
        let ports = connection.ports;
        let slot = self.slots.insert(connection);
        self.by_ports.insert(ports, slot);
        slot
    }

    /// Gives the client in `slot` a host port of its own and turns it into a
    /// request for the guest's port `guest`.
    pub(super) fn bind(&mut self, slot: usize, guest: u32) {
        // There are far fewer connections than ports: one is free.
        let ports = loop {
            let host = self.next_port;
            self.next_port = if host + 1 == EPHEMERAL.end {
                EPHEMERAL.start
            } else {
                host + 1
            };
            let ports = Ports { host, guest };
            if !self.by_ports.contains_key(&ports) {
                break ports;
            }
        };
        self.slots[slot].request(ports);
        self.by_ports.insert(ports, slot);
    }

    /// The guest knows the ports as free; the connection stays until its
    /// backlog is with the host.
    pub(super) fn start_draining(&mut self, slot: usize) {
        self.unqueue(slot);
        let connection = &mut self.slots[slot];
        connection.phase = Phase::Draining;
        self.by_ports.remove(&connection.ports);
    }

    pub(super) fn remove(&mut self, slot: usize) -> Connection {
        self.unqueue(slot);
        let connection = self.slots.remove(slot);
        if self.by_ports.get(&connection.ports) == Some(&slot) {
            self.by_ports.remove(&connection.ports);
        }
        connection
    }

    /// Notes that `slot` has something for the guest, if it has.
    pub(super) fn enqueue(&mut self, slot: usize) {
        if let Some(connection) = self.slots.get_mut(slot)
            && !connection.queued
            && connection.wants_rx()
        {
            connection.queued = true;
            self.pending.push_back(slot);
        }
    }

    pub(super) fn next_pending(&mut self) -> Option<usize> {
        let slot = self.pending.pop_front()?;
        self.slots[slot].queued = false;
        Some(slot)
    }

    fn unqueue(&mut self, slot: usize) {
        let connection = &mut self.slots[slot];
        if connection.queued {
            connection.queued = false;
            self.pending.retain(|&other| other != slot);
        }
    }

    /// The client that has waited longest without a word.
    pub(super) fn oldest_greeting(&self) -> Option<usize> {
        self.slots
            .iter()
            .filter_map(|(slot, connection)| match &connection.phase {
                Phase::Greeting(greeting) => Some((greeting.serial, slot)),
                _ => None,
            })
            .min()
            .map(|(_, slot)| slot)
    }

    pub(super) fn slots_known_to_guest(&self) -> Vec<usize> {
        self.slots
            .iter()
            .filter(|(_, connection)| match connection.phase {
                Phase::Greeting(_) | Phase::Draining => false,
                Phase::Connecting | Phase::Open => !connection.unknown_to_guest(),
            })
            .map(|(slot, _)| slot)
            .collect()
    }
}

impl Index<usize> for Table {
    type Output = Connection;

    fn index(&self, slot: usize) -> &Connection {
        &self.slots[slot]
    }
}

impl IndexMut<usize> for Table {
    fn index_mut(&mut self, slot: usize) -> &mut Connection {
        &mut self.slots[slot]
    }
}
