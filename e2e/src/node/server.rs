//! The CRI server's process: started, stopped, killed, started again.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::VersionRequest;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Node, Server, lock};
use crate::{Cri, artifacts, eventually, reaper};

const START_WITHIN: Duration = Duration::from_secs(30);
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// Puts a device that cannot be opened in the place of /dev/kvm, if there is
/// one, for what it executes alone; $0 is a name to make a directory of.
const HIDE_KVM: &str = r#"
    set -e
    mkdir -p "$0"; mount -t tmpfs -o nodev none "$0"; mknod "$0/kvm" c 10 232
    [ ! -e /dev/kvm ] || mount --bind "$0/kvm" /dev/kvm
    exec "$@"
"#;

/// Shows a kernel without seccomp filters to what it executes alone. It has them
/// all the same.
const HIDE_FILTERS: &str =
    r#"mount --bind /dev/null /proc/sys/kernel/seccomp/actions_avail && exec "$0" "$@""#;

/// Lines of the server's log that a failed test prints.
const LOG_TAIL_LINES: usize = 60;

impl Node {
    /// Starts the server and waits until it answers.
    pub fn start_server(&self) -> Result<()> {
        self.spawn_server()?;
        let cri = eventually("the server to answer", START_WITHIN, || {
            if let Some(child) = lock(&self.process).as_mut()
                && let Some(status) = child.try_wait()?
            {
                // Waiting on does not help; the outer check reports it.
                return Ok(Err(anyhow::anyhow!(
                    "it ended: {status}\n{}",
                    self.log_tail()
                )));
            }
            std::os::unix::net::UnixStream::connect(self.socket()).context("connect")?;
            let cri = Cri::connect(&self.socket())?;
            cri.version(VersionRequest {
                version: "v1".into(),
            })
            .context("Version")?;
            Ok::<_, anyhow::Error>(Ok(cri))
        })??;
        *lock(&self.cri) = Some(cri);
        Ok(())
    }

    fn spawn_server(&self) -> Result<()> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_file())
            .context("server log")?;
        // The shell joins the cgroup before anything else can be started.
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(self.cgroup.procs_file());
        if self.without_kvm.load(Ordering::Relaxed) {
            command.args(["unshare", "--mount", "sh", "-c", HIDE_KVM]);
            command.arg(self.dir.join("nodev"));
        }
        if self.without_filters.load(Ordering::Relaxed) {
            command.args(["unshare", "--mount", "sh", "-c", HIDE_FILTERS]);
        }
        match self.server {
            Server::Drupe => command
                .arg(self.program("drupe", artifacts::daemon)?)
                .args(["serve", "--config"])
                .arg(self.config_file()),
            Server::Containerd => command
                .arg("containerd")
                .arg("--config")
                .arg(self.config_file()),
        };
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .current_dir("/");
        let child = reaper::spawn_own(&self.cgroup, || {
            self.netns
                .run(|| command.spawn().context("start the server"))
        })?;
        *lock(&self.process) = Some(child);
        Ok(())
    }

    /// Whether the server that is started next can open /dev/kvm, where there is
    /// one.
    pub fn let_have_kvm(&self, may: bool) {
        self.without_kvm.store(!may, Ordering::Relaxed);
    }

    /// Whether the server that is started next finds seccomp filters.
    pub fn let_have_filters(&self, may: bool) {
        self.without_filters.store(!may, Ordering::Relaxed);
    }

    /// Starts a server that is expected to end by itself, and returns what it
    /// said and how it ended.
    pub fn run_server_to_its_end(&self, within: Duration) -> Result<(ExitStatus, String)> {
        self.spawn_server()?;
        let status = self.wait_server(within)?;
        Ok((
            status,
            fs::read_to_string(self.log_file()).context("server log")?,
        ))
    }

    /// Asks the server to end (SIGTERM) and waits until it has.
    pub fn stop_server(&self) -> Result<()> {
        self.signal_server(Signal::SIGTERM)?;
        let status = self.wait_server(STOP_WITHIN)?;
        ensure!(
            status.success(),
            "the server ended with {status}\n{}",
            self.log_tail()
        );
        Ok(())
    }

    /// Ends the server without notice (SIGKILL).
    pub fn kill_server(&self) -> Result<()> {
        self.signal_server(Signal::SIGKILL)?;
        self.wait_server(STOP_WITHIN).map(drop)
    }

    fn signal_server(&self, signal: Signal) -> Result<()> {
        let process = lock(&self.process);
        let pid = process.as_ref().context("no server runs")?.id();
        kill(Pid::from_raw(i32::try_from(pid)?), signal)
            .with_context(|| format!("{signal} to the server"))
    }

    fn wait_server(&self, within: Duration) -> Result<ExitStatus> {
        let status = eventually("the server to end", within, || {
            let mut process = lock(&self.process);
            let child = process.as_mut().context("no server runs")?;
            child.try_wait()?.context("it runs")
        })?;
        *lock(&self.process) = None;
        Ok(status)
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join("server.log")
    }

    /// What the server has logged, in all its runs.
    pub fn log(&self) -> Result<String> {
        fs::read_to_string(self.log_file()).context("server log")
    }

    /// The end of the server's log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let log = self.log().unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }
}
