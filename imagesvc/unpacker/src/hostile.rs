//! Archives that break every rule, for tests and fuzzers: made of any bytes.
//! Whatever they say, they are taken or refused in one line, and what is made
//! of them is sound.
//!
//! `cargo test` plays scripts of a fixed random generator and the files below
//! the image service's `fuzz/corpus`, `make fuzz` looks for new ones.

mod archive;
#[cfg(test)]
mod tests;

use std::io::Cursor;

use crate::erofs::{Nid, ReadError, Reader};
use crate::layer::{Compression, Converted, Limits, convert};

/// An error is a fault of ours; else whether the script was taken.
type Judged = Result<bool, String>;

/// What an error may say: it is shown to users, who did not write the image.
const LONGEST_ERROR: usize = 2048;
/// Far below what a node allows, so that limits are met.
const LIMITS: Limits = Limits {
    max_uncompressed_bytes: 1 << 20,
    max_ratio: 50,
    ratio_floor_bytes: 256 << 10,
    max_entries: 200,
    max_file_bytes: 1 << 30,
    max_metadata_bytes: 256 << 10,
    max_tail_bytes: 16 << 10,
};

/// A layer's archive, whose members the script describes.
pub fn layer(script: &[u8]) -> Judged {
    let (kind, rest) = script.split_first().unwrap_or((&0, &[]));
    let (declared, archive) = match kind % 4 {
        // Any bytes, compressed or not.
        0 => (Compression::None, rest.to_vec()),
        1 => (Compression::Gzip, rest.to_vec()),
        2 => (Compression::Zstd, rest.to_vec()),
        _ => (Compression::None, archive::of(rest)),
    };
    let once = image(declared, &archive);
    if once != image(declared, &archive) {
        return Err("the same archive came to two ends".to_owned());
    }
    match once {
        Ok((converted, image)) => {
            sound(&converted, &image)?;
            Ok(true)
        }
        Err(message) => refused(&message),
    }
}

fn image(declared: Compression, archive: &[u8]) -> Result<(Converted, Vec<u8>), String> {
    let mut out = Cursor::new(Vec::new());
    let converted = convert(archive, declared, &LIMITS, &mut out).map_err(|e| e.to_string())?;
    Ok((converted, out.into_inner()))
}

fn refused(text: &str) -> Judged {
    if text.len() > LONGEST_ERROR || text.contains('\n') || text.contains('\u{1b}') {
        return Err(format!("an error that is no line: {text:?}"));
    }
    Ok(false)
}

/// Within its limits, and readable throughout.
fn sound(converted: &Converted, image: &[u8]) -> Result<(), String> {
    let length = image.len() as u64;
    if converted.erofs_len != length || length > 2 * LIMITS.max_uncompressed_bytes {
        return Err(format!("{converted:?} of {length} bytes"));
    }
    let damaged = |error: ReadError| error.to_string();
    let mut reader = Reader::open(Cursor::new(image)).map_err(damaged)?;
    let mut left: Vec<Nid> = vec![reader.root()];
    let mut seen = 0;
    while let Some(nid) = left.pop() {
        let directory = reader.directory(nid).map_err(damaged)?;
        let mut odd = None;
        reader
            .entries(&directory, |entry| {
                seen += 1;
                let plain = !entry.name.is_empty() && !entry.name.contains(&b'/');
                if !plain || entry.name == b".." || entry.name.contains(&0) {
                    odd = Some(entry.name.to_vec());
                }
                if entry.is_directory {
                    left.push(entry.nid);
                }
            })
            .map_err(damaged)?;
        if let Some(name) = odd {
            return Err(format!("a file called {name:?}"));
        }
        if seen > 4 * LIMITS.max_entries {
            return Err(format!("{seen} names, or a loop"));
        }
    }
    Ok(())
}
