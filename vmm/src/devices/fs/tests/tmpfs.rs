//! A small file system of a test's own.

use std::path::Path;
use std::process::Command;

/// A tmpfs for the length of a test.
pub(super) struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    pub(super) fn mount(at: &'a Path, options: &str) -> Self {
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(at)
            .status()
            .unwrap();
        assert!(status.success(), "mounting a tmpfs");
        Self(at)
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        // Lazily: the device may hold a directory of it.
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}
