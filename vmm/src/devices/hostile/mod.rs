//! Drivers that break every rule, for tests and fuzzers.
//!
//! A *script*, any bytes, is read as what a guest does: descriptors anywhere,
//! chains that loop, indices that jump, resets in between. Whatever it says,
//! a device answers within bounded time, touches nothing outside of the
//! guest's memory (there are guard pages around it), and either goes on or
//! ends the machine by an error.
//!
//! A script may be played with [`Script::racing`]: another thread changes
//! rings and buffers while the device reads them, so that what is read twice
//! is not the same twice.
//!
//! [`targets`] has an entry for each device and for what else reads a guest's
//! words: both transports and the log thread. `cargo test` plays scripts of a
//! fixed random generator and the files below `vmm/fuzz/corpus`, `make fuzz`
//! looks for new ones.

mod canary;
mod front;
mod guest;
mod memory;
mod output;
mod race;
mod registers;
pub mod targets;
mod templates;
#[cfg(test)]
mod tests;
mod world;

#[cfg(test)]
pub(crate) use canary::Canary;
#[cfg(test)]
pub(crate) use guest::descriptor;

/// A script being read. Past its end are zeroes.
pub struct Script<'a> {
    left: &'a [u8],
    racing: bool,
}

impl<'a> Script<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            left: bytes,
            racing: false,
        }
    }

    /// Played against a guest that changes its memory meanwhile.
    pub fn racing(bytes: &'a [u8]) -> Self {
        Self {
            left: bytes,
            racing: true,
        }
    }

    fn is_over(&self) -> bool {
        self.left.is_empty()
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let count = N.min(self.left.len());
        let (head, rest) = self.left.split_at(count);
        array[..count].copy_from_slice(head);
        self.left = rest;
        array
    }

    fn short(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (head, rest) = self.left.split_at(most.min(self.left.len()));
        self.left = rest;
        head
    }

    /// One of `many`, which is not empty.
    fn pick<T: Copy>(&mut self, many: &[T]) -> T {
        many[usize::from(self.byte()) % many.len()]
    }

    /// A length: usual ones, edges, and any.
    fn len(&mut self) -> u32 {
        match self.byte() % 12 {
            0 => 0,
            1 => 1,
            2 => 12,
            3 => 16,
            4 => 44,
            5 => 512,
            6 => 4096,
            7 => 65536,
            8 => 1 << 20,
            9 => u32::MAX,
            10 => u32::from(self.short()),
            _ => self.long() as u32,
        }
    }
}
