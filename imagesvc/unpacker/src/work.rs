//! The three tasks. Everything from here on reads what strangers wrote.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use unpacker_client::{Compression, Done, Fault, Limits, Task, Word};

use crate::fault;
use crate::layer::{self, Decompressed, Restored};
use crate::session::Session;

/// Pieces in which the archive goes on. No more than a pipe takes at once.
const PIECE: usize = 256 * 1024;

/// Does `task` with the descriptors that came with it; gives the last word.
pub(crate) fn perform(task: Task, fds: Vec<OwnedFd>, session: &Session) -> Word {
    let mut files = fds.into_iter().map(File::from);
    let (Some(first), second) = (files.next(), files.next()) else {
        return without_files();
    };
    match (task, second) {
        (Task::Decompress { declared, .. }, Some(archive)) => decompress(first, declared, archive),
        (Task::Write { limits, received }, Some(image)) => {
            let received = Rc::new(Cell::new(received));
            match layer::write(first, &limits, received, image, || session.uuid()) {
                Ok(written) => Word::Done(Done::Written(written)),
                Err(error) => fault::failed(&error),
            }
        }
        (Task::Directories { limits, uuid }, second) => {
            let layers = second.into_iter().chain(files).collect();
            match directories(first, layers, &limits, uuid) {
                Ok(len) => Word::Done(Done::Directories(len)),
                Err(error) => fault::failed(&error),
            }
        }
        _ => without_files(),
    }
}

fn without_files() -> Word {
    Word::Failed {
        fault: Fault::Node,
        reason: "files are missing beside the task".to_owned(),
    }
}

fn decompress(layer: File, declared: Compression, mut archive: File) -> Word {
    let failed = |offset, source| fault::failed(&layer::Error::Read { offset, source });
    let mut decompressed = match Decompressed::new(layer, declared) {
        Ok(decompressed) => decompressed,
        Err(source) => return failed(0, source),
    };
    let mut piece = vec![0; PIECE];
    let mut produced = 0;
    loop {
        let len = match decompressed.read(&mut piece) {
            Ok(0) => return Word::Done(Done::Decompressed),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return failed(produced, source),
        };
        match archive.write_all(&piece[..len]) {
            Ok(()) => produced += len as u64,
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Word::Unread,
            Err(source) => return failed(produced, source),
        }
    }
}

fn directories(
    image: File,
    layers: Vec<File>,
    limits: &Limits,
    uuid: [u8; 16],
) -> Result<Option<u64>, layer::Error> {
    match Restored::of(layers, limits)? {
        Some(restored) => restored.write(uuid, image).map(Some),
        None => Ok(None),
    }
}
