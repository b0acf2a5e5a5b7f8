//! A driver as a script wants it.

use std::io;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Script;
use super::memory::{Guarded, REGIONS};
use super::race;
use super::templates::Templates;
use crate::devices::{Device, Interrupt, Io, Poller};
use crate::transport::place_rings;

/// Each queue's rings: descriptors, then these.
pub(super) const RING_SPACE: u64 = 0x4000;
pub(super) const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Where buffers mostly lie, and how far the requests' are from each other.
pub(super) const DATA: u64 = 0x4_0000;
pub(super) const DATA_SPACE: u64 = 0x400;
/// Descriptors, places of data and requests that are used over and over in a
/// race, so that what the other thread changes is what the device reads.
pub(super) const FEW_DESCRIPTORS: u16 = 8;
pub(super) const FEW_PLACES: u8 = 4;
const FEW_TEMPLATES: usize = 3;
/// Times that a race offers one chain.
const RACES: usize = 128;
/// Actions of one script; more only repeat.
const ACTIONS: usize = 512;
/// Rounds of events at once.
const ROUNDS: usize = 8;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

struct Silent;

impl Interrupt for Silent {
    fn queue_used(&self, _: usize) {}
    fn config_changed(&self) {}
}

/// Plays `script` against `device`; `host` is what the host's side does when
/// the script says so. The reason if the machine was ended.
///
/// # Panics
///
/// When the device wrote outside of the guest's memory.
pub(super) fn play<D: Device>(
    device: D,
    script: &mut Script<'_>,
    templates: Templates,
    host: impl FnMut(&mut D, &mut Io<'_>, u8),
) -> io::Result<Option<String>> {
    let guarded = Guarded::new()?;
    let mem = guarded.regions().ok_or(io::ErrorKind::InvalidInput)?;
    let mut guest = Guest::new(device, mem.clone(), templates)?;
    guest.say_hello()?;
    let ended = if script.racing {
        let (queues, seed) = (guest.queues.len(), script.long());
        guest.few_templates_from = Some(script.byte().into());
        race::beside(&mem, queues, seed, || guest.act(script, host))
    } else {
        guest.act(script, host)
    };
    let ended = ended.err().map(|e| e.to_string());
    drop(mem);
    // Threads of the device end with it.
    drop(guest);
    assert!(guarded.is_unharmed(), "written outside of guest memory");
    Ok(ended)
}

struct Guest<D> {
    device: D,
    queues: Vec<Queue>,
    avail: Vec<u16>,
    mem: GuestMemoryMmap,
    epoll: Arc<Epoll>,
    templates: Templates,
    /// The first of the few templates of a race.
    few_templates_from: Option<usize>,
}

impl<D: Device> Guest<D> {
    fn new(mut device: D, mem: GuestMemoryMmap, templates: Templates) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        device.start(Poller::new(epoll.clone(), 0))?;
        let queues = device
            .queue_sizes()
            .iter()
            .map(|&size| Queue::new(size).map_err(io::Error::other))
            .collect::<io::Result<Vec<_>>>()?;
        let mut guest = Self {
            device,
            avail: vec![0; queues.len()],
            queues,
            mem,
            epoll,
            templates,
            few_templates_from: None,
        };
        guest.set_up(u64::MAX);
        Ok(guest)
    }

    /// As a driver does that follows the rules, with features of its choice.
    fn set_up(&mut self, features: u64) {
        let features = features & self.device.features();
        self.device.set_features(features);
        for (index, queue) in (0u64..).zip(&mut self.queues) {
            let base = RING_SPACE * index;
            queue.reset();
            place_rings(queue, [base, base + AVAIL, base + USED]);
            queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            queue.set_ready(true);
        }
        self.avail.fill(0);
        // Rings as they are before a driver has used them.
        let rings = vec![0; self.queues.len() * RING_SPACE as usize];
        self.write(0, &rings);
    }

    fn say_hello(&mut self) -> io::Result<()> {
        let Some(hello) = &self.templates.hello else {
            return Ok(());
        };
        self.write(DATA, hello);
        let (queue, len) = (self.queues.len() - 1, hello.len() as u32);
        self.write_descriptor(queue, 0, (DATA, len, NEXT, 1));
        self.write_descriptor(queue, 1, (DATA + 0x1000, 4096, WRITE, 0));
        self.offer(queue, 0);
        self.kick(queue)
    }

    fn act(
        &mut self,
        script: &mut Script<'_>,
        mut host: impl FnMut(&mut D, &mut Io<'_>, u8),
    ) -> io::Result<()> {
        for _ in 0..ACTIONS {
            if script.is_over() {
                break;
            }
            let queue = usize::from(script.byte()) % self.queues.len();
            let action = match script.byte() % 16 {
                // What ends most machines leaves nothing to race for.
                1 | 2 | 6 | 8 | 10 if script.racing => 12,
                action => action,
            };
            match action {
                0 => {
                    let index = script.short();
                    let flags = script.short() & 7;
                    let next = script.short();
                    self.describe(queue, index, script, flags, next);
                }
                1 => self.offer(queue, script.short()),
                2 => {
                    // Far ones end the machine: not too often.
                    self.avail[queue] = match script.byte() % 8 {
                        0 => script.short(),
                        n => self.avail[queue].wrapping_add(n.into()),
                    };
                    self.publish(queue);
                }
                3 | 4 => self.kick(queue)?,
                5 => self.events()?,
                6 => {
                    self.device.reset();
                    self.set_up(script.long() | script.long());
                }
                7 => {
                    let offset = script.pick(&[0, 4, 8, 59, 4096, usize::MAX]);
                    let bytes = script.bytes(9);
                    self.device.write_config(offset, bytes);
                    let mut data = vec![0; usize::from(script.byte())];
                    self.device.read_config(offset, &mut data);
                }
                8 => {
                    let at = self.address(script);
                    let most = usize::from(script.byte());
                    self.write(at, script.bytes(most));
                }
                9 => self.indirect(queue, script),
                10 => self.change_queue(queue, script),
                11 => {
                    let mut io = Io {
                        mem: &self.mem,
                        queues: &mut self.queues,
                        irq: &Silent,
                    };
                    host(&mut self.device, &mut io, script.byte());
                }
                // The most common: a chain that could be a request.
                _ => self.request(queue, script)?,
            }
        }
        self.events()
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        // What lies outside of memory a guest cannot write either.
        let _ = self.mem.write(bytes, GuestAddress(at));
    }

    fn address(&self, script: &mut Script<'_>) -> u64 {
        let n = u64::from(script.short());
        match script.byte() % 10 {
            // Not over the rings, as above.
            0 if script.racing => DATA + n,
            0 => n,
            1 => REGIONS[1].0 + n,
            2 => REGIONS[0].1 as u64 - n % 64,
            3 => REGIONS[1].0 + REGIONS[1].1 as u64 - n % 64,
            4 => u64::MAX - n,
            5 => (3 << 20) + n,
            6 => script.long() | if script.racing { DATA } else { 0 },
            _ => DATA + 16 * n % (1 << 19),
        }
    }

    fn describe(&self, queue: usize, index: u16, script: &mut Script<'_>, flags: u16, next: u16) {
        let addr = self.address(script);
        let len = script.len();
        self.write_descriptor(queue, index, (addr, len, flags, next));
    }

    fn write_descriptor(&self, queue: usize, index: u16, what: (u64, u32, u16, u16)) {
        let size = self.queues[queue].max_size();
        let at = RING_SPACE * queue as u64 + 16 * u64::from(index % size);
        self.write(at, &descriptor(what));
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let size = self.queues[queue].max_size();
        let ahead = self.avail[queue].wrapping_sub(self.queues[queue].next_avail());
        if ahead >= size && self.few_templates_from.is_some() {
            // The queue is full, and one more would end the race.
            return;
        }
        let slot = u64::from(self.avail[queue] % size);
        let ring = RING_SPACE * queue as u64 + AVAIL;
        self.write(ring + 4 + 2 * slot, &head.to_le_bytes());
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        self.publish(queue);
    }

    fn publish(&self, queue: usize) {
        let ring = RING_SPACE * queue as u64 + AVAIL;
        self.write(ring + 2, &self.avail[queue].to_le_bytes());
    }

    fn kick(&mut self, queue: usize) -> io::Result<()> {
        if !self.queues[queue].ready() {
            return Ok(());
        }
        let mut io = Io {
            mem: &self.mem,
            queues: &mut self.queues,
            irq: &Silent,
        };
        self.device.kicked(queue, &mut io)
    }

    fn events(&mut self) -> io::Result<()> {
        for _ in 0..ROUNDS {
            let mut events = [EpollEvent::empty(); 8];
            let ready = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
            for event in &events[..ready] {
                let mut io = Io {
                    mem: &self.mem,
                    queues: &mut self.queues,
                    irq: &Silent,
                };
                self.device
                    .host_ready(event.data() as u32, event.events(), &mut io)?;
            }
            if ready == 0 {
                break;
            }
        }
        Ok(())
    }

    /// A template with some bytes changed, or the script's own.
    fn header(&self, script: &mut Script<'_>) -> Vec<u8> {
        let choice = match (self.few_templates_from, usize::from(script.byte())) {
            (Some(first), n) => first + n % FEW_TEMPLATES,
            (None, n) => n,
        };
        let all = &self.templates.requests;
        let Some(template) = all.get(choice % (all.len() + 1)) else {
            let most = usize::from(script.byte() % 80);
            return script.bytes(most).to_vec();
        };
        let mut header = template.clone();
        for _ in 0..script.byte() % 8 / 5 {
            let at = usize::from(script.byte()) % header.len();
            header[at] = script.byte();
        }
        header
    }

    /// A header, data and a place to answer; then a kick.
    fn request(&mut self, queue: usize, script: &mut Script<'_>) -> io::Result<()> {
        let shape = script.byte();
        let header = self.header(script);
        // Somewhere else each time, so that some can be under way at once.
        let place = match (script.racing, script.byte()) {
            (true, n) => n % FEW_PLACES,
            (false, n) => n,
        };
        let data = DATA + DATA_SPACE * u64::from(place);
        self.write(data, &header);
        let mut parts = vec![(data, header.len() as u32, 0)];
        if shape & 1 != 0 {
            parts.push((self.address(script), script.len(), 0));
        }
        if shape & 2 != 0 {
            parts.push((self.address(script), script.len(), WRITE));
        }
        if shape & 4 != 0 {
            parts.push((data + 0x200, 1, WRITE));
        }
        if shape & 8 != 0 {
            parts.push((DATA + 0x4_8000, 4096, WRITE));
        }
        if shape & 16 != 0 {
            parts.remove(0);
        }
        let head = match (script.racing, u16::from(script.byte())) {
            (true, n) => n % FEW_DESCRIPTORS,
            (false, n) => n,
        };
        let count = parts.len();
        for (n, (addr, len, flags)) in (0u16..).zip(parts) {
            let index = head.wrapping_add(n);
            let more = if usize::from(n) + 1 < count { NEXT } else { 0 };
            self.write_descriptor(queue, index, (addr, len, flags | more, index + 1));
        }
        // Over and over in a race, as far as the device takes it.
        let times = if script.racing { RACES } else { 1 };
        for _ in 0..times {
            self.offer(queue, head % self.queues[queue].max_size());
        }
        if shape & 32 != 0 {
            return Ok(());
        }
        self.kick(queue)
    }

    /// A table of descriptors somewhere, and one that points to it.
    fn indirect(&mut self, queue: usize, script: &mut Script<'_>) {
        let table = self.address(script);
        let count = script.byte() % 8;
        for n in 0..count {
            let entry = (
                self.address(script),
                script.len(),
                script.short() & 7,
                u16::from(script.byte() % 10),
            );
            self.write(table.wrapping_add(16 * u64::from(n)), &descriptor(entry));
        }
        let len = match script.byte() % 4 {
            0 => script.len(),
            1 => 16 * 65535,
            _ => 16 * u32::from(count),
        };
        let index = u16::from(script.byte());
        self.write_descriptor(queue, index, (table, len, INDIRECT, 0));
        self.offer(queue, index % self.queues[queue].max_size());
    }

    /// The queue is taken away or put elsewhere, if it is fit to be used then.
    fn change_queue(&mut self, index: usize, script: &mut Script<'_>) {
        let places = [(); 3].map(|()| self.address(script));
        let queue = &mut self.queues[index];
        let before = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
        match script.byte() % 4 {
            0 => queue.set_ready(false),
            1 => queue.set_event_idx(script.byte() & 1 == 0),
            2 => queue.set_size(1 << (script.byte() % 9)),
            _ => {
                place_rings(queue, places);
                queue.set_ready(true);
                // What a transport refuses, too.
                if !queue.is_valid(&self.mem) {
                    place_rings(queue, before);
                }
            }
        }
    }
}

/// A descriptor as it lies in a ring's table (virtio 1.2 §2.7.5).
pub(crate) fn descriptor((addr, len, flags, next): (u64, u32, u16, u16)) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
