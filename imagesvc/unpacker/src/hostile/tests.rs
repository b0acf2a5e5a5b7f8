//! Scripts of a fixed generator and those that were worth keeping.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::layer;

/// Plays kept scripts and random ones; how many were taken, and of how many.
fn all(random: impl Strategy<Value = Vec<u8>>) -> (usize, usize) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/layer");
    let mut scripts: Vec<Vec<u8>> = match fs::read_dir(&corpus) {
        Ok(files) => files
            .map(|file| fs::read(file.unwrap().path()).unwrap())
            .collect(),
        Err(_) => Vec::new(),
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    scripts.extend((0..2000).map(|_| random.new_tree(&mut runner).unwrap().current()));
    let taken = scripts
        .iter()
        .filter(|script| layer(script).unwrap_or_else(|e| panic!("{e}: {script:?}")));
    (taken.count(), scripts.len())
}

#[test]
fn archives() {
    let any_bytes = proptest::collection::vec(any::<u8>(), 0..120);
    let script = any_bytes.prop_map(|bytes| [&[3][..], &bytes].concat());
    let (taken, of) = all(script);
    // Else they would test little.
    assert!((20..of - 20).contains(&taken), "{taken} of {of}");
}

#[test]
fn archives_of_any_bytes() {
    all(proptest::collection::vec(any::<u8>(), 0..600));
}
