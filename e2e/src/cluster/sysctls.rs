//! The settings of the machine's kernel that a kubelet changes, put back at
//! the end.

use std::fs;

use anyhow::{Context, Result};

const CHANGED: &[&str] = &[
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/vm/panic_on_oom",
    "/proc/sys/kernel/panic",
    "/proc/sys/kernel/panic_on_oops",
    "/proc/sys/kernel/keys/root_maxkeys",
    "/proc/sys/kernel/keys/root_maxbytes",
];

pub struct Sysctls {
    before: Vec<(&'static str, String)>,
}

impl Sysctls {
    pub fn save() -> Result<Self> {
        let read = |path: &&'static str| {
            let value = fs::read_to_string(path).with_context(|| (*path).to_owned())?;
            Ok((*path, value))
        };
        let before = CHANGED.iter().map(read).collect::<Result<_>>()?;
        Ok(Self { before })
    }

    /// Each as PATH=VALUE.
    pub fn settings(&self) -> Vec<String> {
        let setting = |(path, value): &(&str, String)| format!("{path}={}", value.trim());
        self.before.iter().map(setting).collect()
    }
}

impl Drop for Sysctls {
    fn drop(&mut self) {
        for (path, value) in &self.before {
            if let Err(error) = fs::write(path, value) {
                eprintln!("cannot put {path} back to {}: {error}", value.trim());
            }
        }
    }
}
