//! What runs the guest's kernel.

pub mod kvm;
pub mod uml;

use std::io::PipeReader;

use nix::sys::wait::WaitStatus;
use vmm_client::protocol::EndCause;

use crate::filter::Refusals;

/// A running guest.
pub trait Machine {
    /// Ends it now.
    fn kill(&mut self);

    /// A child process was reaped. `Some` when the machine has ended with it.
    fn child_ended(&mut self, status: WaitStatus) -> Option<Ending>;

    /// The agent has reported ready. `Some` when its kernel is not to go on.
    fn guest_ready(&mut self) -> Option<Ending> {
        None
    }
}

/// How a machine has ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ending {
    pub cause: EndCause,
    /// In words.
    pub reason: String,
}

impl Ending {
    pub fn powered_off() -> Self {
        Self {
            cause: EndCause::PoweredOff,
            reason: "the guest powered off".to_owned(),
        }
    }

    pub fn killed(reason: impl Into<String>) -> Self {
        Self {
            cause: EndCause::Killed,
            reason: reason.into(),
        }
    }

    /// Of the machine or of one of its devices, beyond repair.
    pub fn fault(reason: String) -> Self {
        Self {
            cause: EndCause::Fault,
            reason,
        }
    }
}

/// A machine whose kernel runs.
pub struct Started {
    pub machine: Box<dyn Machine>,
    /// Everything the guest's kernel and its console print.
    pub console: PipeReader,
    /// Calls of the guest kernel's process that the node refuses.
    pub refusals: Option<Refusals>,
}
