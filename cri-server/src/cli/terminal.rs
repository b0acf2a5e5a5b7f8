//! The caller's terminal while something else speaks through it.

use std::io::{self, Stdin};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// A terminal that hands on every key as it is, until this is dropped.
pub struct Raw {
    before: Termios,
}

impl Raw {
    pub fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        // A program that panics is aborted, which drops nothing.
        let (tell, of_panic) = (std::panic::take_hook(), before.clone());
        std::panic::set_hook(Box::new(move |panic| {
            restore(&of_panic);
            tell(panic);
        }));
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore(&self.before);
    }
}

fn restore(before: &Termios) {
    if let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, before) {
        // One that was closed has no state to restore.
        eprintln!("drupe: cannot restore the terminal: {error}");
    }
}

/// Width and height in characters.
pub fn size(terminal: &Stdin) -> io::Result<(u16, u16)> {
    let size = tcgetwinsize(terminal)?;
    Ok((size.ws_col, size.ws_row))
}
