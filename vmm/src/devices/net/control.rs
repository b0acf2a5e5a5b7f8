//! The control queue (virtio 1.2 §5.1.6.5): the driver says how many queue
//! pairs it uses. There is one only where the device has several.

use std::io;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::QueueT;

use super::Net;
use crate::devices::Io;
use crate::devices::iov::{Iov, split};

/// Commands handled before other devices of the loop get their turn.
const COMMANDS_PER_TURN: usize = 16;

impl Net {
    /// Serves the control queue `index`; false when commands were left for
    /// the next turn.
    pub(super) fn control(&mut self, index: usize, io: &mut Io<'_>) -> io::Result<bool> {
        if !io.queues[index].ready() {
            return Ok(true);
        }
        for _ in 0..COMMANDS_PER_TURN {
            let Some(chain) = io.next_chain(index)? else {
                return Ok(true);
            };
            let head = chain.head_index();
            let written = match split(chain, io.mem) {
                Ok((command, ack)) => {
                    let pairs = self.pairs_wanted(command);
                    let status = match pairs {
                        Some(pairs) => {
                            self.use_pairs(pairs, io)?;
                            VIRTIO_NET_OK
                        }
                        None => VIRTIO_NET_ERR,
                    };
                    ack.fill_from(&[status as u8])
                }
                Err(_) => 0,
            };
            io.give_back(index, head, written as u32)?;
            io.notify(index)?;
        }
        Ok(false)
    }

    /// What a VQ_PAIRS_SET asks for; `None` for any other command.
    fn pairs_wanted(&self, mut command: Iov<'_>) -> Option<u16> {
        let [class, command_code, low, high] = command.take_bytes()?;
        let pairs = u16::from_le_bytes([low, high]);
        let known = u32::from(class) == VIRTIO_NET_CTRL_MQ
            && u32::from(command_code) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
        let possible = (1..=self.pair_count()).contains(&pairs);
        (known && self.multi_queue() && possible).then_some(pairs)
    }
}
