//! One sentence of an error's whole chain, and whose fault it is.

use std::error::Error;
use std::io;

use unpacker_client::{Fault, LimitError, Word};

use crate::{erofs, layer};

/// What the daemon is told of an error.
pub(crate) fn failed(error: &layer::Error) -> Word {
    let mut fault = Fault::Layer;
    let mut reason = String::new();
    let mut link: Option<&dyn Error> = Some(error);
    while let Some(error) = link {
        let text = error.to_string();
        // Transparent links repeat the one below.
        if !reason.ends_with(&text) {
            if !reason.is_empty() {
                reason.push_str(": ");
            }
            reason.push_str(&text);
        }
        if let Some(found) = beyond_the_layer(error) {
            fault = found;
        }
        link = error.source();
    }
    Word::Failed { fault, reason }
}

fn beyond_the_layer(error: &(dyn Error + 'static)) -> Option<Fault> {
    if error.is::<LimitError>() {
        return Some(Fault::Resources);
    }
    if let Some(error) = error.downcast_ref::<layer::Error>() {
        return match error {
            layer::Error::Limit(_) | layer::Error::HeaderTooLong { .. } => Some(Fault::Resources),
            // Of the daemon, which tells its own.
            layer::Error::Uuid(_) => Some(Fault::Node),
            _ => None,
        };
    }
    match error.downcast_ref::<layer::EntryError>() {
        Some(layer::EntryError::TooLong { .. }) => return Some(Fault::Resources),
        // Transparent: the chain goes on below the inner error.
        Some(layer::EntryError::Image(inner)) => return of_image(inner),
        _ => {}
    }
    if let Some(error) = error.downcast_ref::<erofs::Error>() {
        return of_image(error);
    }
    if error.is::<erofs::ReadError>() {
        // The store has it from an unpacker.
        return Some(Fault::Node);
    }
    let io = error.downcast_ref::<io::Error>()?;
    is_full(io).then_some(Fault::Resources)
}

fn of_image(error: &erofs::Error) -> Option<Fault> {
    match error {
        erofs::Error::ImageTooLarge { .. }
        | erofs::Error::TooManyEntries { .. }
        | erofs::Error::MetadataTooLarge { .. } => Some(Fault::Resources),
        // Writing is this node's part; a full disk is found further down.
        erofs::Error::Io(_) => Some(Fault::Node),
        erofs::Error::WrongSize { .. } | erofs::Error::NotADirectory(_) => None,
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}
