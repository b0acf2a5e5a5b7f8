//! Registries that break every rule, for tests and fuzzers: documents made of
//! any bytes. Whatever they say, they are taken or refused in one line.
//! Archives are the unpacker's.
//!
//! `cargo test` plays scripts of a fixed random generator and the files below
//! `fuzz/corpus`, `make fuzz` looks for new ones.

#[cfg(test)]
mod tests;

use crate::manifest::{self, Parsed};

/// An error is a fault of ours; else whether the script was taken.
type Judged = Result<bool, String>;

/// What an error may say: it is shown to users, who did not write the image.
const LONGEST_ERROR: usize = 2048;

/// A manifest, an index or a configuration; the first byte says as what the
/// registry gives it.
pub fn document(script: &[u8]) -> Judged {
    let (kind, text) = script.split_first().unwrap_or((&0, &[]));
    let types = [
        "",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json; charset=utf-8",
    ];
    let content_type = types[usize::from(*kind) % types.len()];
    let parsed = match manifest::parse(text, content_type) {
        Ok(Parsed::Index(_) | Parsed::Image(_)) => true,
        Err(error) => refused(&error)?,
    };
    let config = manifest::parse_config(text)
        .and_then(|(config, _)| manifest::check_platform(&config).map(|()| true));
    Ok(config.map_or_else(|error| refused(&error), Ok)? || parsed)
}

fn refused(error: &impl ToString) -> Judged {
    let text = error.to_string();
    if text.len() > LONGEST_ERROR || text.contains('\n') || text.contains('\u{1b}') {
        return Err(format!("an error that is no line: {text:?}"));
    }
    Ok(false)
}
