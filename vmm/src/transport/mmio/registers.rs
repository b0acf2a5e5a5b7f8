//! What a driver has written so far, as plain data.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

/// Bits of Status (virtio 1.2 §2.1).
pub(super) mod status {
    pub(in super::super) const ACKNOWLEDGE: u32 = 1;
    pub(in super::super) const DRIVER: u32 = 2;
    pub(in super::super) const DRIVER_OK: u32 = 4;
    pub(in super::super) const FEATURES_OK: u32 = 8;
    pub(in super::super) const FAILED: u32 = 128;
}

/// Everything about the driver but its interrupt line, which is in
/// [`super::Line`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub status: u32,
    pub device_features_sel: u32,
    pub driver_features_sel: u32,
    pub driver_features: u64,
    pub queue_sel: u32,
    pub queues: Vec<QueueRegisters>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// The device's QueueNumMax; no choice of the driver's.
    pub max_size: u16,
    pub size: u16,
    pub ready: bool,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
}

impl Registers {
    pub(super) fn new(sizes: impl Iterator<Item = u16>) -> Self {
        let queues = sizes.map(|max_size| QueueRegisters {
            max_size,
            size: max_size,
            ..QueueRegisters::default()
        });
        Self {
            queues: queues.collect(),
            ..Self::default()
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.queues.iter().map(|queue| queue.max_size));
    }

    pub(super) fn has(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    pub(super) fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_sel as usize)
    }

    /// The selected queue, where the driver may change it now: features are
    /// settled and the queue is not in use.
    pub(super) fn queue_in_setup(&mut self) -> Option<&mut QueueRegisters> {
        let settled = self.has(status::FEATURES_OK) && !self.has(status::FAILED);
        let queue = self.queues.get_mut(self.queue_sel as usize)?;
        (settled && !queue.ready).then_some(queue)
    }

    pub(super) fn set_driver_features(&mut self, value: u32) {
        if !self.has(status::DRIVER) || self.has(status::FEATURES_OK) {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    /// Whether the driver chose among what is offered, and a modern device.
    pub(super) fn features_are_sound(&self, offered: u64) -> bool {
        self.driver_features & !offered == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }
}

pub(super) fn set_low(value: &mut u64, low: u32) {
    *value = *value & !u64::from(u32::MAX) | u64::from(low);
}

pub(super) fn set_high(value: &mut u64, high: u32) {
    *value = *value & u64::from(u32::MAX) | u64::from(high) << 32;
}

/// The `sel`-th 32 bits.
pub(super) fn word(value: u64, sel: u32) -> u32 {
    match sel {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}
