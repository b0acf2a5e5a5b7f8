//! The terminal of a process that has one.

use std::ffi::{CStr, c_int};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::unistd::chown;

use super::{Result, duplicate};
use crate::container::plan::{Failure, Step};

/// Opens a terminal of the container's own devpts, makes it the controlling
/// one and perhaps /dev/console, and returns its master.
pub(super) fn open_terminal(uid: u32, rows: u16, columns: u16, console: bool) -> Result<OwnedFd> {
    let fail = |errno| Failure {
        step: Step::Terminal,
        index: 0,
        errno,
    };
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = open(c"/dev/ptmx", flags, Mode::empty()).map_err(fail)?;
    let mut number: c_int = 0;
    let unlock: c_int = 0;
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: each request reads or writes the one variable given, of the type
    // that ioctl_tty(2) states.
    unsafe {
        Errno::result(libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCSPTLCK,
            &raw const unlock,
        ))
        .map_err(fail)?;
        Errno::result(libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTN,
            &raw mut number,
        ))
        .map_err(fail)?;
        Errno::result(libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCSWINSZ,
            &raw const size,
        ))
        .map_err(fail)?;
    }
    let mut buffer = [0u8; 32];
    let path = terminal_path(&mut buffer, number.unsigned_abs());
    let slave = open(path, flags, Mode::empty()).map_err(fail)?;
    chown(path, Some(uid.into()), None).map_err(fail)?;
    if console {
        mount(
            Some(path),
            c"/dev/console",
            None::<&CStr>,
            MsFlags::MS_BIND,
            None::<&CStr>,
        )
        .map_err(fail)?;
    }
    // SAFETY: TIOCSCTTY takes an integer.
    Errno::result(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) }).map_err(fail)?;
    for number in 0..3 {
        duplicate(slave.as_raw_fd(), number).map_err(fail)?;
    }
    Ok(master)
}

/// `/dev/pts/NUMBER`, without allocating.
fn terminal_path(buffer: &mut [u8; 32], number: u32) -> &CStr {
    const PREFIX: &[u8] = b"/dev/pts/";
    buffer[..PREFIX.len()].copy_from_slice(PREFIX);
    let digits = number.checked_ilog10().map_or(1, |log| log as usize + 1);
    let end = PREFIX.len() + digits;
    let mut rest = number;
    for byte in buffer[PREFIX.len()..end].iter_mut().rev() {
        *byte = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    buffer[end] = 0;
    CStr::from_bytes_until_nul(buffer).unwrap_or(c"/dev/pts/0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_paths_are_written_without_allocating() {
        for number in [0, 7, 10, 4095, u32::MAX] {
            let mut buffer = [0; 32];
            let path = terminal_path(&mut buffer, number);
            assert_eq!(path.to_str().unwrap(), format!("/dev/pts/{number}"));
        }
    }
}
