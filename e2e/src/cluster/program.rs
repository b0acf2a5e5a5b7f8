//! The programs of the cluster: their processes, their logs, their cgroup.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::sysctls::Sysctls;
use crate::cgroup::Cgroup;
use crate::guard::Guard;
use crate::{Node, artifacts, cgroup, eventually};

const STOP_WITHIN: Duration = Duration::from_secs(60);
const LOG_TAIL_LINES: usize = 40;

/// Where the programs run, beside the node's cgroup: what is in that one are
/// the server's processes.
pub struct Programs {
    cgroup: Cgroup,
    _guard: Guard,
}

impl Programs {
    /// For those of `node`'s cluster, in whose `dir` all of them have their
    /// files. A test that is killed has its `sysctls` put back.
    pub fn of(node: &Node, sysctls: &Sysctls) -> Result<Self> {
        let name = node.dir.file_name().context("the node's directory")?;
        let cgroup = Cgroup::create(&format!("{}-cluster", name.display()))?;
        let guard = Guard::start(&node.dir, &cgroup, &sysctls.settings())?;
        Ok(Self {
            cgroup,
            _guard: guard,
        })
    }

    /// What a process writes its id to in order to be one of them.
    #[must_use]
    pub fn procs_file(&self) -> PathBuf {
        self.cgroup.procs_file()
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        if let Err(error) = self.cgroup.kill() {
            eprintln!("end the cluster's programs: {error:#}");
        }
    }
}

pub struct Program {
    name: &'static str,
    log: PathBuf,
    child: Child,
}

impl Program {
    /// Starts the program `name` in the node's network; its log is in `dir`.
    pub fn start(
        name: &'static str,
        node: &Node,
        programs: &Programs,
        dir: &Path,
        args: &[String],
    ) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        // One that is started again goes on in the same log.
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| log.display().to_string())?;
        let program = artifacts::kubernetes(name)?;
        let mut command = cgroup::command_in(&programs.procs_file(), &program);
        command
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let child = node.netns.run(|| command.spawn().context(name))?;
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
