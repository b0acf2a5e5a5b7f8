//! Taking a file for this process alone. The stores of images and of pods do
//! it when they are opened.

use std::{
    fs::{File, TryLockError},
    io,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

/// A child that a killed daemon was about to execute has its files open for a
/// moment longer.
const LOCK_WITHIN: Duration = Duration::from_secs(3);

/// Whether `file` is now locked by this process; another one may have a moment
/// to let go of it.
pub fn lock(file: &File) -> io::Result<bool> {
    lock_within(file, LOCK_WITHIN)
}

fn lock_within(file: &File, limit: Duration) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => return Ok(true),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // A lock can be waited for, but not for so long: the thread stays behind
    // where another process keeps it, and lets go at once should it get it.
    let (taken, outcome) = mpsc::channel();
    let waiting = file.try_clone()?;
    thread::Builder::new()
        .name("lock".to_owned())
        .spawn(move || taken.send(waiting.lock()))?;
    match outcome.recv_timeout(limit) {
        Ok(locked) => locked.map(|()| true),
        Err(RecvTimeoutError::Timeout) => Ok(false),
        Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_twice() -> (tempfile::NamedTempFile, File, File) {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || File::open(path.path()).unwrap();
        let (first, second) = (open(), open());
        (path, first, second)
    }

    #[test]
    fn a_lock_that_is_let_go_in_time_is_taken() {
        let (_path, first, second) = open_twice();
        assert!(lock(&first).unwrap());
        thread::scope(|scope| {
            let second = scope.spawn(move || lock_within(&second, Duration::from_secs(60)));
            drop(first);
            assert!(second.join().unwrap().unwrap());
        });
    }

    #[test]
    fn a_lock_that_another_keeps_is_not_waited_for_without_end() {
        let (_path, first, second) = open_twice();
        assert!(lock(&first).unwrap());
        assert!(!lock_within(&second, Duration::from_millis(20)).unwrap());
    }
}
