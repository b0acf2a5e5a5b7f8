//! Scripts of a fixed generator and those that were worth keeping.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::document;

/// Plays kept scripts and random ones.
fn all(random: impl Strategy<Value = Vec<u8>>) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/document");
    let mut scripts: Vec<Vec<u8>> = match fs::read_dir(&corpus) {
        Ok(files) => files
            .map(|file| fs::read(file.unwrap().path()).unwrap())
            .collect(),
        Err(_) => Vec::new(),
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    scripts.extend((0..2000).map(|_| random.new_tree(&mut runner).unwrap().current()));
    for script in scripts {
        document(&script).unwrap_or_else(|e| panic!("{e}: {script:?}"));
    }
}

#[test]
fn documents() {
    let words = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"layers\"",
        "\"config\"",
        "\"manifests\"",
        "\"digest\"",
        "\"mediaType\"",
        "\"size\"",
        "\"schemaVersion\"",
        "2",
        "-1",
        "1e999",
        "null",
        "\"\\n\\u001b\"",
        "\"application/vnd.oci.image.config.v1+json\"",
    ];
    let text = proptest::collection::vec(prop::sample::select(words.to_vec()), 0..40);
    let script =
        (0u8..4, text).prop_map(|(kind, text)| [&[kind][..], text.concat().as_bytes()].concat());
    all(script);
}
