//! What the daemon hands over, and what it is told. Standard input is the
//! socket, standard output and error are one pipe that the daemon reads when
//! this process has died.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use nix::unistd::close;
use rustix::stdio::stdin;
use unpacker_client::{Order, Word, packet};

/// The daemon's end of standard input.
#[derive(Debug)]
pub struct Session(());

impl Session {
    /// Takes the task; waits for it.
    ///
    /// # Errors
    /// Nobody sends one.
    pub fn open() -> io::Result<(Self, Order, Vec<OwnedFd>)> {
        close_surplus_descriptors()?;
        let (order, fds) = packet::recv_with::<Order>(stdin())?
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        Ok((Self(()), order, fds))
    }

    /// # Errors
    /// The daemon is gone.
    pub fn say(&self, word: &Word) -> io::Result<()> {
        packet::send(stdin(), word)
    }

    /// Says the last word.
    #[must_use]
    pub fn end(&self, word: &Word) -> ExitCode {
        match self.say(word) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("the daemon is gone: {error}");
                ExitCode::FAILURE
            }
        }
    }

    /// Waits for the UUID of the image that was written: the daemon has found
    /// the archive right.
    ///
    /// # Errors
    /// It has not.
    pub fn uuid(&self) -> io::Result<[u8; 16]> {
        let mut uuid = [0; 16];
        match rustix::io::retry_on_intr(|| rustix::io::read(stdin(), &mut uuid))? {
            16 => Ok(uuid),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Whatever the daemon's other threads had open at the wrong moment.
fn close_surplus_descriptors() -> io::Result<()> {
    let mut surplus = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let number: Option<i32> = entry?.file_name().to_str().and_then(|n| n.parse().ok());
        surplus.extend(number.filter(|fd| *fd > 2));
    }
    for fd in surplus {
        match close(fd) {
            // The directory's own.
            Ok(()) | Err(nix::errno::Errno::EBADF) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
