//! Compares this crate's wire with that of a published `api.proto`:
//!
//! ```text
//! dir=$(go -C e2e/tools mod download -json k8s.io/cri-api@v0.36.6 | jq -r .Dir)
//! cargo build --release --workspace --example compare
//! target/release/examples/compare "$dir/pkg/apis/runtime/v1/api.proto"
//! ```
//!
//! Prints what differs, then the digest that `tests/wire` pins; ends with 1 if
//! anything does.

#[path = "../tests/wire/listing.rs"]
mod listing;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use prost::Message;
use prost_types::FileDescriptorSet;
use sha2::{Digest, Sha256};

fn main() -> Result<ExitCode> {
    let path: PathBuf = std::env::args_os()
        .nth(1)
        .context("usage: compare api.proto")?
        .into();
    // An option for loggers that Debian 12's protoc does not know.
    let proto = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {path:?}"))?
        .replace("[debug_redact = true]", "");
    let directory = tempfile::tempdir()?;
    let copy = directory.path().join("api.proto");
    std::fs::write(&copy, proto)?;

    let theirs = listing::of_file(&copy)?;
    let bytes: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/wire.bin"));
    let ours = listing::of(&FileDescriptorSet::decode(bytes)?);
    let keys: BTreeSet<_> = theirs.keys().chain(ours.keys()).collect();
    let differ = keys
        .into_iter()
        .filter(|key| theirs.get(*key) != ours.get(*key));
    let mut same = true;
    for key in differ {
        same = false;
        println!(
            "{key}: there {:?}, here {:?}",
            theirs.get(key),
            ours.get(key)
        );
    }
    let digest = Sha256::digest(listing::text(&theirs));
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    println!(
        "{} lines there, {} here; there {hex}",
        theirs.len(),
        ours.len()
    );
    Ok(if same {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
