//! The guest's side of the device in a test: rings in memory, a driver that
//! fills them, and the event loop that a transport would run.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::devices::hostile::descriptor;
use crate::devices::vsock::packet::{HEADER_LEN, HOST_CID, Header, Ports, TYPE_STREAM};
use crate::devices::vsock::{HostPorts, QUEUE_SIZES, RX, TX, Vsock};
use crate::devices::{Device, Interrupt, Io, Poller};
use crate::transport::place_rings;

pub(super) const GUEST_CID: u32 = 42;
const RX_BUFFER: u32 = 4096;
const TX_BUFFER: u64 = 128 * 1024;
/// How long a test waits for what must come.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) const WRITE: u16 = 2;
pub(super) const NEXT: u16 = 1;

/// A packet that the guest received.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub(super) header: Header,
    pub(super) data: Vec<u8>,
}

impl Packet {
    pub(super) fn ports(&self) -> Ports {
        Ports {
            host: self.header.src_port,
            guest: self.header.dst_port,
        }
    }
}

#[derive(Default)]
pub(super) struct Interrupts([AtomicUsize; 3]);

impl Interrupts {
    pub(super) fn count(&self, queue: usize) -> usize {
        self.0[queue].load(Ordering::SeqCst)
    }
}

impl Interrupt for Interrupts {
    fn queue_used(&self, index: usize) {
        self.0[index].fetch_add(1, Ordering::SeqCst);
    }

    fn config_changed(&self) {}
}

/// Addresses of one ring and the driver's place in it.
struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    next_avail: u16,
    next_used: u16,
}

/// Ends of connections the guest made, by port; a port that is not there is
/// refused.
pub(super) type Answer = Box<dyn FnMut(u32) -> io::Result<UnixStream> + Send>;

struct Answers(Answer);

impl HostPorts for Answers {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        (self.0)(port)
    }
}

pub(super) struct Driver {
    pub(super) mem: GuestMemoryMmap,
    pub(super) device: Vsock,
    pub(super) irq: Interrupts,
    queues: Vec<Queue>,
    rings: Vec<Ring>,
    epoll: Arc<Epoll>,
    path: PathBuf,
    _dir: tempfile::TempDir,
    received: VecDeque<Packet>,
    /// Give buffers back as soon as they were read.
    pub(super) refill: bool,
    idle_rx: Vec<u16>,
    /// What our packets say of our receive buffer.
    pub(super) buf_alloc: u32,
}

impl Driver {
    pub(super) fn new() -> Self {
        Self::answering(Box::new(|_| Err(io::ErrorKind::ConnectionRefused.into())))
    }

    pub(super) fn answering(answer: Answer) -> Self {
        let mut driver = Self::without_buffers(answer);
        driver.idle_rx = (0..QUEUE_SIZES[RX]).collect();
        driver.give_buffers(usize::MAX);
        driver
    }

    pub(super) fn without_buffers(answer: Answer) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut device = Vsock::new(GUEST_CID, listener, Box::new(Answers(answer))).unwrap();
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
        device.start(Poller::new(epoll.clone(), 7)).unwrap();

        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap();
        let mut rings = Vec::new();
        let mut queues = Vec::new();
        for (i, size) in QUEUE_SIZES.into_iter().enumerate() {
            let base = 0x1_0000 * (i as u64 + 1);
            let ring = Ring {
                size,
                desc: base,
                avail: base + 0x4000,
                used: base + 0x8000,
                next_avail: 0,
                next_used: 0,
            };
            let mut queue = Queue::new(size).unwrap();
            queue.set_size(size);
            place_rings(&mut queue, [ring.desc, ring.avail, ring.used]);
            queue.set_event_idx(true);
            queue.set_ready(true);
            rings.push(ring);
            queues.push(queue);
        }
        Self {
            mem,
            device,
            irq: Interrupts::default(),
            queues,
            rings,
            epoll,
            path,
            _dir: dir,
            received: VecDeque::new(),
            refill: true,
            idle_rx: Vec::new(),
            buf_alloc: 256 * 1024,
        }
    }

    pub(super) fn dial(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// A client that asked for `port`, and the REQUEST it led to.
    pub(super) fn dial_port(&mut self, port: u32) -> (UnixStream, Packet) {
        let mut client = self.dial();
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let request = self.packet();
        (client, request)
    }

    pub(super) fn rx_buffer_address(index: u16) -> u64 {
        (4 << 20) + u64::from(index) * u64::from(RX_BUFFER)
    }

    fn tx_buffer_address(slot: u16) -> u64 {
        (8 << 20) + u64::from(slot) * TX_BUFFER
    }

    pub(super) fn describe(
        &self,
        queue: usize,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = self.rings[queue].desc + 16 * u64::from(index);
        let bytes = descriptor((addr, len, flags, next));
        self.mem.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Puts a chain's head on the available ring.
    pub(super) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let at = ring.avail + 4 + 2 * u64::from(ring.next_avail % ring.size);
        self.mem.write_obj(head, GuestAddress(at)).unwrap();
        ring.next_avail = ring.next_avail.wrapping_add(1);
        self.mem
            .store(
                ring.next_avail,
                GuestAddress(ring.avail + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    /// Buffers the driver keeps back become its to give.
    pub(super) fn find_buffers(&mut self) {
        self.idle_rx = (0..QUEUE_SIZES[RX]).collect();
    }

    pub(super) fn give_buffers(&mut self, most: usize) {
        for _ in 0..most {
            let Some(index) = self.idle_rx.pop() else {
                break;
            };
            let addr = Self::rx_buffer_address(index);
            self.describe(RX, index, addr, RX_BUFFER, WRITE, 0);
            self.offer(RX, index);
        }
    }

    pub(super) fn kick(&mut self, queue: usize) {
        self.try_kick(queue).unwrap();
    }

    pub(super) fn try_kick(&mut self, queue: usize) -> io::Result<()> {
        let mut io = Io {
            mem: &self.mem,
            queues: &mut self.queues,
            irq: &self.irq,
        };
        self.device.kicked(queue, &mut io)
    }

    /// One round of the event loop; the number of events that came.
    pub(super) fn turn(&mut self, timeout: Duration) -> usize {
        let mut events = [EpollEvent::empty(); 64];
        let timeout = EpollTimeout::try_from(timeout).unwrap();
        let n = self.epoll.wait(&mut events, timeout).unwrap();
        for event in &events[..n] {
            assert_eq!(event.data() >> 32, 7, "the loop's tag");
            let mut io = Io {
                mem: &self.mem,
                queues: &mut self.queues,
                irq: &self.irq,
            };
            self.device
                .host_ready(event.data() as u32, event.events(), &mut io)
                .unwrap();
        }
        self.collect();
        n
    }

    /// Runs until nothing is left to do right now.
    pub(super) fn settle(&mut self) {
        let start = Instant::now();
        while self.turn(Duration::from_millis(20)) > 0 {
            assert!(start.elapsed() < PATIENCE, "the device never comes to rest");
        }
    }

    /// Takes what the device put on the receive queue.
    pub(super) fn collect(&mut self) {
        let mut given = false;
        loop {
            let ring = &mut self.rings[RX];
            let used: u16 = self
                .mem
                .load(GuestAddress(ring.used + 2), Ordering::Acquire)
                .unwrap();
            if used == ring.next_used {
                break;
            }
            let at = ring.used + 4 + 8 * u64::from(ring.next_used % ring.size);
            ring.next_used = ring.next_used.wrapping_add(1);
            let index: u32 = self.mem.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
            let index = index as u16;
            if len > 0 {
                let addr = Self::rx_buffer_address(index);
                let mut header = [0; HEADER_LEN];
                self.mem
                    .read_slice(&mut header, GuestAddress(addr))
                    .unwrap();
                let header = Header::decode(&header);
                assert_eq!(len, HEADER_LEN as u32 + header.len, "used length");
                assert_eq!(header.src_cid, HOST_CID);
                assert_eq!(header.dst_cid, u64::from(GUEST_CID));
                let mut data = vec![0; header.len as usize];
                self.mem
                    .read_slice(&mut data, GuestAddress(addr + HEADER_LEN as u64))
                    .unwrap();
                self.received.push_back(Packet { header, data });
            }
            self.idle_rx.push(index);
            if self.refill {
                self.give_buffers(1);
                given = true;
            }
        }
        if given {
            self.kick(RX);
        }
    }

    /// The next packet the device sends.
    pub(super) fn packet(&mut self) -> Packet {
        let start = Instant::now();
        loop {
            if let Some(packet) = self.received.pop_front() {
                return packet;
            }
            assert!(start.elapsed() < PATIENCE, "no packet came");
            self.collect();
            self.turn(Duration::from_millis(5));
        }
    }

    pub(super) fn packet_if_any(&mut self) -> Option<Packet> {
        self.collect();
        self.received.pop_front()
    }

    pub(super) fn header(&self, ports: Ports, op: u16) -> Header {
        Header {
            src_cid: GUEST_CID.into(),
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.buf_alloc,
            ..Header::default()
        }
    }

    pub(super) fn send(&mut self, ports: Ports, op: u16) {
        let header = self.header(ports, op);
        self.send_packet(header, &[]);
    }

    pub(super) fn send_packet(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..header
        };
        self.offer_packet(&header, data);
        self.kick(TX);
        self.collect();
    }

    /// A packet in two descriptors, put on the ring without a kick.
    pub(super) fn offer_packet(&mut self, header: &Header, data: &[u8]) {
        let slot = self.rings[TX].next_avail % (QUEUE_SIZES[TX] / 2);
        let at = Self::tx_buffer_address(slot);
        self.mem
            .write_slice(&header.encode(), GuestAddress(at))
            .unwrap();
        let body = at + 64;
        self.mem.write_slice(data, GuestAddress(body)).unwrap();
        let head = slot * 2;
        let header_len = HEADER_LEN as u32;
        if data.is_empty() {
            self.describe(TX, head, at, header_len, 0, 0);
        } else {
            self.describe(TX, head, at, header_len, NEXT, head + 1);
            self.describe(TX, head + 1, body, data.len() as u32, 0, 0);
        }
        self.offer(TX, head);
    }

    /// Chains of the transmit queue the device is done with.
    pub(super) fn sent(&self) -> u16 {
        self.mem
            .load(GuestAddress(self.rings[TX].used + 2), Ordering::Acquire)
            .unwrap()
    }

    /// What a driver writes that wants no interrupt before `index` (EVENT_IDX).
    pub(super) fn set_used_event(&self, queue: usize, index: u16) {
        let ring = &self.rings[queue];
        let at = ring.avail + 4 + 2 * u64::from(ring.size);
        self.mem.write_obj(index, GuestAddress(at)).unwrap();
    }
}
