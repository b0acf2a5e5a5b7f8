//! `drupe-unpacker`: one half of the way from a layer to its image. Started by
//! the daemon only, which hands the task over on standard input.
#![forbid(unsafe_code)]

use std::process::{ExitCode, exit};

/// What the daemon sees of a panic, beside the text on standard error.
const PANICKED: i32 = 101;

fn main() -> ExitCode {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        // Not by a signal: the first process of a namespace has none for itself.
        exit(PANICKED);
    }));
    drupe_unpacker::run()
}
