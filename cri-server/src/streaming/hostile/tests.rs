//! Scripts of a fixed generator and those that were worth keeping.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::{Outcome, request, spdy, websocket};

const SCRIPTS: usize = 400;
const REQUEST: &[u8] =
    b"\x00\x02\x00POST /exec/TOKEN HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n\
    Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n";

/// Plays kept scripts and random ones; what became of each.
fn all(name: &str, begin: &[u8], run: fn(&[u8]) -> Result<Outcome, String>) -> Vec<Outcome> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut scripts: Vec<Vec<u8>> = match fs::read_dir(&corpus) {
        Ok(files) => files
            .map(|file| fs::read(file.unwrap().path()).unwrap())
            .collect(),
        Err(_) => Vec::new(),
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let random = proptest::collection::vec(any::<u8>(), 0..600);
    scripts.extend((0..SCRIPTS).map(|_| {
        let rest = random.new_tree(&mut runner).unwrap().current();
        [begin, &rest].concat()
    }));
    let play = |script: &Vec<u8>| run(script).unwrap_or_else(|e| panic!("{e}: {script:?}"));
    scripts.iter().map(play).collect()
}

/// Else they would test little.
fn some_but_not_all(outcomes: &[Outcome], what: fn(&Outcome) -> bool) {
    let count = outcomes.iter().filter(|outcome| what(outcome)).count();
    assert!((1..outcomes.len()).contains(&count), "{count}");
}

#[test]
fn requests() {
    let random = all("request", b"\0\0\0", request);
    assert!(random.iter().any(|outcome| !outcome.upgraded));
    let whole = all("request", REQUEST, request);
    assert!(whole.iter().any(|outcome| outcome.upgraded));
}

#[test]
fn spdy_frames() {
    let outcomes = all("spdy", b"", spdy);
    assert!(outcomes.iter().all(|outcome| outcome.upgraded));
    some_but_not_all(&outcomes, |outcome| outcome.cut_off);
}

#[test]
fn websocket_messages() {
    let outcomes = all("websocket", b"", websocket);
    assert!(outcomes.iter().all(|outcome| outcome.upgraded));
    some_but_not_all(&outcomes, |outcome| outcome.cut_off);
}
