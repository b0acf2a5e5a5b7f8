//! What a processor reaches outside of its memory: four ports' worth of a PC,
//! and the devices' windows. Everywhere else nothing answers.

use std::io;
use std::sync::{Mutex, PoisonError};

use super::layout::{KEYBOARD_COMMAND, KEYBOARD_DATA, KEYBOARD_RESET, MMIO, SERIAL_PORT};
use vm_memory::GuestMemoryMmap;

use super::serial::Serial;
use crate::transport::mmio::{Mmio, WINDOW};

const SERIAL_PORTS: u16 = 8;

/// The guest asked to start over.
#[derive(Debug, PartialEq, Eq)]
pub struct Reset;

/// Lock order: `serial` alone.
pub struct Bus {
    serial: Mutex<Serial>,
    devices: Vec<Mmio>,
    /// Mapped for as long as a processor may run.
    _mem: GuestMemoryMmap,
}

impl Bus {
    pub fn new(serial: Serial, devices: Vec<Mmio>, mem: GuestMemoryMmap) -> Self {
        Self {
            serial: Mutex::new(serial),
            devices,
            _mem: mem,
        }
    }

    fn serial_register(port: u16) -> Option<u8> {
        let offset = port.checked_sub(SERIAL_PORT)?;
        (offset < SERIAL_PORTS).then_some(offset as u8)
    }

    /// A string instruction brings as many bytes as it repeats.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        if let Some(register) = Self::serial_register(port) {
            let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
            for byte in data {
                *byte = serial.read(register);
            }
            return;
        }
        // The keyboard controller is always ready for a command.
        let idle = matches!(port, KEYBOARD_DATA | KEYBOARD_COMMAND);
        data.fill(if idle { 0 } else { 0xff });
    }

    pub fn port_out(&self, port: u16, data: &[u8]) -> Option<Reset> {
        if let Some(register) = Self::serial_register(port) {
            let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
            for byte in data {
                serial.write(register, *byte);
            }
        }
        (port == KEYBOARD_COMMAND && data == [KEYBOARD_RESET]).then_some(Reset)
    }

    fn device(&self, address: u64) -> Option<(&Mmio, u64)> {
        let at = address.checked_sub(MMIO)?;
        let device = self.devices.get(usize::try_from(at / WINDOW).ok()?)?;
        Some((device, at % WINDOW))
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.device(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// An error ends the machine.
    pub fn write(&self, address: u64, data: &[u8]) -> io::Result<()> {
        match self.device(address) {
            Some((device, offset)) => device.write(offset, data),
            None => Ok(()),
        }
    }
}
