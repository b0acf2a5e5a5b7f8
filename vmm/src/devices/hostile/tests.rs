//! Scripts of a fixed generator and those that were worth keeping.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Script;
use super::targets::{self, Ended};

/// No script may keep a device busy for longer, on a slow and busy machine.
const LONGEST: Duration = Duration::from_secs(20);

/// A xorshift generator: the same scripts everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Scripts for the target `name`: kept ones first, then `count` random ones.
fn scripts(name: &str, count: usize) -> Vec<Vec<u8>> {
    let seed = name.bytes().fold(0x9e37_79b9_7f4a_7c15, |seed, byte| {
        (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let mut random = Random(seed | 1);
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut scripts = Vec::new();
    if let Ok(files) = std::fs::read_dir(&corpus) {
        for file in files {
            scripts.push(std::fs::read(file.unwrap().path()).unwrap());
        }
    }
    scripts.extend((0..count).map(|_| {
        let len = 1 << (3 + random.next() % 9);
        (0..len).map(|_| random.next() as u8).collect()
    }));
    scripts
}

/// Not all scripts end the machine, nor do all leave it running: else they
/// would test little.
fn judge(ended: &[Ended]) {
    let count = ended.iter().flatten().count();
    assert!(count < ended.len(), "every script ended the machine");
    assert!(count > 0, "no script ended the machine");
}

fn each(name: &str, count: usize, run: impl Fn(&[u8]) -> io::Result<Ended>) -> Vec<Ended> {
    scripts(name, count)
        .iter()
        .map(|script| {
            let start = Instant::now();
            let ended = run(script).unwrap();
            assert!(start.elapsed() < LONGEST, "{name}: a script takes long");
            ended
        })
        .collect()
}

#[test]
fn blk_survives() {
    judge(&each("blk", 1500, |s| targets::blk(Script::new(s))));
}

#[test]
fn balloon_survives() {
    judge(&each("balloon", 1500, |s| targets::balloon(Script::new(s))));
}

#[test]
fn rng_survives() {
    judge(&each("rng", 500, |s| targets::rng(Script::new(s))));
}

#[test]
fn vsock_survives() {
    judge(&each("vsock", 1500, |s| targets::vsock(Script::new(s))));
}

#[test]
fn net_survives() {
    let world = targets::net_world().unwrap();
    judge(&each("net", 150, |script| world.play(script)));
}

#[test]
fn fs_survives() {
    let world = targets::fs_world().unwrap();
    judge(&each("fs", 500, |script| world.play(script)));
}

#[test]
fn vhost_user_survives() {
    let ended = each("vhost_user", 300, |s| targets::vhost_user(Script::new(s)));
    assert!(ended.iter().all(Option::is_some));
}

#[test]
fn mmio_survives() {
    judge(&each("mmio", 1500, |s| targets::mmio(Script::new(s))));
}

#[test]
fn logs_are_their_containers() {
    each("logs", 200, |s| targets::logs(Script::new(s)));
}

#[test]
fn framing_keeps_every_byte() {
    each("framing", 300, |s| targets::framing(Script::new(s)));
}

/// Each device against a guest that changes what it said meanwhile. Few and
/// long scripts: what two threads do at once takes both of them to run.
#[test]
fn all_survive_a_race() {
    let raced = targets::Raced::new().unwrap();
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for device in 0..96 {
        let mut script: Vec<u8> = (0..4096).map(|_| random.next() as u8).collect();
        script[0] = device;
        let start = Instant::now();
        raced.play(&script).unwrap();
        assert!(start.elapsed() < LONGEST, "device {}", device % 6);
    }
    each("race", 0, |script| raced.play(script));
}
