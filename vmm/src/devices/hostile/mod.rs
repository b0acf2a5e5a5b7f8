//! Drivers that break every rule, for tests and fuzzers.
//!
//! A *script*, any bytes, is read as what a guest does: descriptors anywhere,
//! chains that loop, indices that jump, resets in between. Whatever it says,
//! a device answers within bounded time, touches nothing outside of the
//! guest's memory (there are guard pages around it), and either goes on or
//! ends the machine by an error.
//!
//! [`targets`] has an entry for each device and for the vhost-user front;
//! `cargo test` plays scripts of a fixed random generator and the files below
//! `vmm/fuzz/corpus`, `make fuzz` looks for new ones.

mod front;
mod guest;
mod memory;
pub mod targets;
mod templates;
#[cfg(test)]
mod tests;
mod world;

#[cfg(test)]
pub(crate) use guest::descriptor;

/// A script being read. Past its end are zeroes.
pub struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let count = N.min(self.0.len());
        let (head, rest) = self.0.split_at(count);
        array[..count].copy_from_slice(head);
        self.0 = rest;
        array
    }

    fn short(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
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
