//! One program of the cluster: its process and its log.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::NetNs;
use crate::{artifacts, eventually};

const STOP_WITHIN: Duration = Duration::from_secs(60);
const LOG_TAIL_LINES: usize = 40;

pub struct Program {
    name: &'static str,
    log: PathBuf,
    child: Child,
}

impl Program {
    /// Starts the program `name` in `netns`; its log is in `dir`.
    pub fn start(name: &'static str, netns: &NetNs, dir: &Path, args: &[String]) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        // One that is started again goes on in the same log.
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| log.display().to_string())?;
        let mut command = Command::new(artifacts::kubernetes(name)?);
        command
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let child = netns.run(|| command.spawn().context(name))?;
        Ok(Self { name, log, child })
    }

    /// Fails with the end of its log if it has ended.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            anyhow::bail!("{} ended: {status}\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }

    /// SIGTERM, and the wait for its end.
    pub fn stop(mut self) -> Result<()> {
        self.check()?;
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, Signal::SIGTERM).with_context(|| format!("end {}", self.name))?;
        eventually(&format!("{} to end", self.name), STOP_WITHIN, || {
            let ended = self.child.try_wait()?;
            ensure!(ended.is_some(), "it runs");
            Ok::<_, anyhow::Error>(())
        })
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Already gone is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
