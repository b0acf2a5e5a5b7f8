//! The serial port (16550): the guest's console, one way.

use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub struct Serial {
    port: vm_superio::Serial<Irq, NoEvents, Output>,
}

impl Serial {
    /// The port, the end that shows what the guest prints, and what raises the
    /// port's interrupt.
    pub fn new() -> io::Result<(Self, PipeReader, EventFd)> {
        let (reader, writer) = io::pipe()?;
        let flags = OFlag::from_bits_retain(fcntl(writer.as_fd(), FcntlArg::F_GETFL)?);
        fcntl(writer.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let irq = EventFd::new(EFD_NONBLOCK)?;
        let output = Output {
            pipe: writer,
            dropped: 0,
        };
        let port = vm_superio::Serial::new(Irq(irq.try_clone()?), output);
        Ok((Self { port }, reader, irq))
    }

    pub fn read(&mut self, register: u8) -> u8 {
        self.port.read(register)
    }

    pub fn write(&mut self, register: u8, value: u8) {
        // The output takes everything, and so does an eventfd that is read at
        // once by KVM.
        if let Err(error) = self.port.write(register, value) {
            tracing::debug!(%error, "serial port");
        }
    }
}

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A processor never waits for the reader: what finds the pipe full is
/// dropped, and counted.
struct Output {
    pipe: PipeWriter,
    dropped: u64,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.pipe.write(bytes).is_err() {
            if self.dropped == 0 {
                tracing::warn!("the guest prints faster than its console is read: bytes are lost");
            }
            self.dropped += bytes.len() as u64;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.dropped > 0 {
            tracing::warn!(bytes = self.dropped, "of the guest's console were lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_is_printed_comes_out() {
        let (mut serial, mut reader, _irq) = Serial::new().unwrap();
        for byte in b"hello" {
            serial.write(0, *byte);
        }
        drop(serial);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn a_console_that_nobody_reads_blocks_nobody() {
        let (mut serial, mut reader, _irq) = Serial::new().unwrap();
        for _ in 0..1 << 20 {
            serial.write(0, b'x');
        }
        let lost = serial.port.writer().dropped;
        drop(serial);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text.len() as u64 + lost, 1 << 20);
        assert!(lost > 0);
    }
}
