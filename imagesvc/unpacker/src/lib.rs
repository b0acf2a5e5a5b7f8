//! drupe-unpacker: makes EROFS images of image layers, in a jail.
//!
//! Archives come from strangers, and reading them is what this does: so it
//! does it where there is nothing to be had. The daemon starts it and hands it
//! a task and open files on standard input ([`session`]); it gives up
//! everything else ([`jail`]), and only then looks at the first byte.
//!
//! A library beside the program, for the tests and the fuzzers.
#![forbid(unsafe_code)]

pub mod erofs;
mod fault;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
pub mod jail;
pub mod layer;
pub mod session;
mod work;

use std::process::ExitCode;

use jail::Filters;
use session::Session;
use unpacker_client::Word;

/// What the program does.
#[must_use]
pub fn run() -> ExitCode {
    let (session, order, fds) = match Session::open() {
        Ok(opened) => opened,
        Err(error) => {
            eprintln!("no task on standard input: {error}");
            return ExitCode::FAILURE;
        }
    };
    let missing = match jail::enter(&order, Filters::All) {
        Ok(missing) => missing,
        Err(error) => {
            return session.end(&Word::Failed {
                fault: error.fault(),
                reason: error.to_string(),
            });
        }
    };
    if let Err(error) = session.say(&Word::Ready { missing }) {
        eprintln!("the daemon is gone: {error}");
        return ExitCode::FAILURE;
    }
    let word = work::perform(order.task, fds, &session);
    session.end(&word)
}
