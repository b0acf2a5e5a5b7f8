//! What a program that has ended said.

use std::process::Output;

use anyhow::{Result, ensure};

/// Its standard output if it succeeded, else an error with what it said.
pub fn of_success(program: &str, args: &[&str], output: &Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{program} {}: {}: {}",
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
