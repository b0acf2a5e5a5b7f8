//! A device's interrupt line and the two registers that belong to it: the only
//! ones a guest touches once its driver runs, so no lock is in their way.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::Interrupt;

/// Bits of InterruptStatus (virtio 1.2 §4.2.2).
const USED: u32 = 1;
const CONFIG: u32 = 2;

#[derive(Debug)]
pub struct Line {
    /// What the guest has not acknowledged yet.
    status: AtomicU32,
    /// ConfigGeneration.
    generation: AtomicU32,
    irqfd: EventFd,
}

impl Line {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            irqfd: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Written whenever the guest shall be interrupted.
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn clear(&self) {
        self.status.store(0, Ordering::Release);
    }

    /// Interrupts again for what came before the driver listened.
    pub(super) fn remind(&self) {
        if self.status() != 0 {
            self.pulse();
        }
    }

    fn raise(&self, bit: u32) {
        // The bit first: a guest that is interrupted looks at it.
        self.status.fetch_or(bit, Ordering::AcqRel);
        self.pulse();
    }

    fn pulse(&self) {
        // One that is full has the guest interrupted already.
        if let Err(error) = self.irqfd.write(1)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::debug!(%error, "interrupt line");
        }
    }
}

impl Interrupt for Line {
    fn queue_used(&self, _index: usize) {
        self.raise(USED);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(CONFIG);
    }
}
