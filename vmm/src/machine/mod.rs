//! What runs the guest's kernel.

pub mod kvm;
pub mod uml;

use std::io::PipeReader;

use nix::sys::wait::WaitStatus;

/// A running guest.
pub trait Machine {
    /// Ends it now.
    fn kill(&mut self);

    /// A child process was reaped. `Some` when the machine has ended with it:
    /// how, in words.
    fn child_ended(&mut self, status: WaitStatus) -> Option<String>;
}

/// A machine whose kernel runs.
pub struct Started {
    pub machine: Box<dyn Machine>,
    /// Everything the guest's kernel and its console print.
    pub console: PipeReader,
}
