//! Another processor of the guest, that changes rings and buffers while a
//! device is at work on them.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::guest::{AVAIL, DATA, DATA_SPACE, FEW_DESCRIPTORS, FEW_PLACES, RING_SPACE};

/// Lengths to change one to.
const LENS: [u32; 8] = [0, 1, 8, 15, 40, 4096, 1 << 20, u32::MAX];
/// Addresses: data, an end of memory and what is behind it, anywhere.
const ADDRESSES: [u64; 5] = [DATA, (1 << 20) - 8, 1 << 20, (2 << 20) - 1, u64::MAX - 7];
/// Bytes of names and headers.
const BYTES: [u8; 6] = [0, 1, b'.', b'/', 0x7f, 0xff];
/// How much of a buffer is changed: headers are at its start.
const HEADER_SPACE: u64 = 96;

/// Runs `work` with a thread beside it that changes `mem` as `seed` says.
pub(super) fn beside<R>(
    mem: &GuestMemoryMmap,
    queues: usize,
    seed: u64,
    work: impl FnOnce() -> R,
) -> R {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    let begun = Barrier::new(2);
    thread::scope(|scope| {
        let mut other = Other {
            mem,
            queues: queues as u64,
            random: seed | 1,
        };
        let (stopped, started) = (&over, &begun);
        scope.spawn(move || {
            started.wait();
            while !stopped.load(Ordering::Relaxed) {
                other.change();
            }
        });
        // However it ends.
        let _over = Over(&over);
        begun.wait();
        work()
    })
}

struct Other<'m> {
    mem: &'m GuestMemoryMmap,
    queues: u64,
    random: u64,
}

impl Other<'_> {
    fn next(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % below
    }

    fn pick<T: Copy>(&mut self, many: &[T]) -> T {
        many[self.next(many.len() as u64) as usize]
    }

    fn change(&mut self) {
        let ring = RING_SPACE * self.next(self.queues);
        // Chains are a few descriptors long.
        let index = self.next(u64::from(FEW_DESCRIPTORS) + 4);
        let descriptor = ring + 16 * index;
        match self.next(64) {
            0..16 => {
                let len = self.pick(&LENS);
                self.flicker(descriptor + 8, &len.to_le_bytes());
            }
            16..28 => {
                let flags = self.next(8) as u16;
                self.flicker(descriptor + 12, &flags.to_le_bytes());
            }
            28..36 => {
                let addr = self.pick(&ADDRESSES);
                self.flicker(descriptor, &addr.to_le_bytes());
            }
            36..40 => {
                let next = self.next(12) as u16;
                self.flicker(descriptor + 14, &next.to_le_bytes());
            }
            40..44 => {
                let slot = self.next(128);
                let head = self.next(FEW_DESCRIPTORS.into()) as u16;
                self.flicker(ring + AVAIL + 4 + 2 * slot, &head.to_le_bytes());
            }
            // It ends the machine, so not too often.
            44 if self.next(1 << 14) == 0 => {
                let ahead = self.next(4) as u16;
                self.flicker(ring + AVAIL + 2, &ahead.to_le_bytes());
            }
            _ => {
                let place = DATA_SPACE * self.next(FEW_PLACES.into());
                let byte = self.pick(&BYTES);
                let at = DATA + place + self.next(HEADER_SPACE);
                self.flicker(at, &[byte]);
            }
        }
    }

    /// Changes bytes and then puts back what was there, so that most chains
    /// are sound when the device first sees them.
    fn flicker(&mut self, at: u64, new: &[u8]) {
        let at = GuestAddress(at);
        let mut old = [0; 8];
        let old = &mut old[..new.len()];
        // All of it lies within the first region.
        let _ = self.mem.read(old, at);
        let _ = self.mem.write(new, at);
        for _ in 0..self.next(64) {
            std::hint::spin_loop();
        }
        let _ = self.mem.write(old, at);
    }
}
