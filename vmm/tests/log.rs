//! The VMM's own log.

use std::fs::{self, OpenOptions};
use std::process::{Command, Stdio};

#[test]
fn it_is_bounded_and_keeps_its_newest_part() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmm.log");
    // As long as a guest has made it.
    fs::write(&path, "a line of before\n".repeat(100_000)).unwrap();
    let log = OpenOptions::new()
        .read(true)
        .append(true)
        .open(&path)
        .unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_drupe-vmm"))
        .stdin(Stdio::null())
        .stderr(log)
        .status()
        .unwrap();
    assert!(!status.success(), "it ran without a spec");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.len() <= 256 * 1024, "{} bytes", text.len());
    assert!(text.len() >= 128 * 1024, "{} bytes", text.len());
    let last = text.lines().last().unwrap();
    assert!(last.contains("cannot run"), "{last}");
}
