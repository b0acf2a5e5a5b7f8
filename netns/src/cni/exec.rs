//! Runs one plugin once: environment in, JSON in, JSON out, bounded in size
//! and time (CNI 1.1, section 2).

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, ChildStdin, Command},
    time::{Instant, sleep, timeout},
};

use super::{
    config::find_plugin,
    error::{Call, CniError},
};

/// A result is a page of JSON.
pub(crate) const MAX_OUTPUT: usize = 1024 * 1024;
/// How much of the end of standard error is kept for the error's text.
const STDERR_TAIL: usize = 4096;
/// A killed process is gone at once unless the kernel holds it; then it is
/// left to the runtime to reap.
const REAP_TIMEOUT: Duration = Duration::from_secs(2);
/// How often, and for how long, a file that is still being written by its
/// installer is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);

/// `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

/// Where plugins are and how long each may take.
#[derive(Clone, Debug)]
pub(crate) struct Runner {
    pub(crate) bin_dirs: Vec<PathBuf>,
    pub(crate) timeout: Duration,
}

/// The pod that a call is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    pub(crate) sandbox_id: &'a str,
    pub(crate) interface: &'a str,
    /// None once the namespace is gone.
    pub(crate) netns: Option<&'a Path>,
    pub(crate) args: &'a str,
}

impl Runner {
    /// Runs plugin `kind` and returns what it wrote. Dropping the future kills
    /// the plugin.
    pub(crate) async fn run(
        &self,
        verb: Verb,
        kind: &str,
        target: Option<Target<'_>>,
        input: &[u8],
    ) -> Result<Vec<u8>, CniError> {
        let call = Call {
            plugin: kind.to_owned(),
            verb,
            sandbox: target.map(|target| target.sandbox_id.to_owned()),
        };
        let program = find_plugin(kind, &self.bin_dirs).ok_or_else(|| CniError::NoPlugin {
            plugin: kind.to_owned(),
            dirs: self.bin_dirs.clone(),
        })?;
        let mut command = self.command(verb, &program, target);
        let started = Instant::now();
        let mut running = match spawn(&mut command).await {
            Ok(child) => Running::new(child),
            Err(source) => return Err(CniError::Spawn { call, source }),
        };
        let ended = timeout(self.timeout, running.talk(input)).await;
        if !matches!(ended, Ok(Ok(_))) {
            running.kill().await;
        }
        let (status, stdout, stderr) = match ended {
            Ok(Ok(ended)) => ended,
            Ok(Err(TalkError::TooMuchOutput)) => {
                return Err(CniError::TooMuchOutput {
                    call,
                    limit: MAX_OUTPUT,
                });
            }
            Ok(Err(TalkError::Io(source))) => return Err(CniError::Talk { call, source }),
            Err(_) => {
                return Err(CniError::TimedOut {
                    call,
                    after: self.timeout,
                });
            }
        };
        let millis = started.elapsed().as_millis();
        tracing::debug!(%call, %status, millis, stderr, "CNI plugin ended");
        if status.success() {
            Ok(stdout)
        } else {
            Err(plugin_error(call, status, &stdout, stderr))
        }
    }

    fn command(&self, verb: Verb, program: &Path, target: Option<Target<'_>>) -> Command {
        let mut command = Command::new(program);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .env("CNI_COMMAND", verb.name())
            .env("CNI_PATH", path_list(&self.bin_dirs));
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"] {
            command.env_remove(name);
        }
        if let Some(target) = target {
            command
                .env("CNI_CONTAINERID", target.sandbox_id)
                .env("CNI_IFNAME", target.interface)
                .env("CNI_ARGS", target.args)
                .env("CNI_NETNS", target.netns.unwrap_or(Path::new("")));
        }
        command
    }
}

fn path_list(dirs: &[PathBuf]) -> OsString {
    let mut list = OsString::new();
    for dir in dirs {
        if !list.is_empty() {
            list.push(":");
        }
        list.push(dir);
    }
    list
}

/// Spawns, waiting out the moment in which the executable is still open for
/// writing: the kernel tells nobody when that ends.
async fn spawn(command: &mut Command) -> io::Result<Child> {
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        match command.spawn() {
            Err(error)
                if error.kind() == io::ErrorKind::ExecutableFileBusy
                    && Instant::now() < deadline =>
            {
                sleep(BUSY_PAUSE).await;
            }
            spawned => return spawned,
        }
    }
}

/// A plugin and its process group, which is killed when this is dropped before
/// the plugin was reaped. Until then the group's number cannot be another's.
struct Running {
    child: Child,
    group: Option<Pid>,
}

enum TalkError {
    Io(io::Error),
    TooMuchOutput,
}

impl From<io::Error> for TalkError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Running {
    fn new(child: Child) -> Self {
        let group = child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .map(Pid::from_raw);
        Self { child, group }
    }

    async fn talk(&mut self, input: &[u8]) -> Result<(ExitStatus, Vec<u8>, String), TalkError> {
        let missing = || io::Error::other("the plugin's standard streams are gone");
        let stdin = self.child.stdin.take().ok_or_else(missing)?;
        let stdout = self.child.stdout.take().ok_or_else(missing)?;
        let stderr = self.child.stderr.take().ok_or_else(missing)?;
        let ((), stdout, stderr) = tokio::try_join!(
            async { write_all(stdin, input).await.map_err(TalkError::from) },
            read_bounded(stdout),
            async { read_tail(stderr).await.map_err(TalkError::from) },
        )?;
        let status = self.child.wait().await?;
        self.group = None;
        Ok((status, stdout, stderr))
    }

    async fn kill(&mut self) {
        self.kill_group();
        match timeout(REAP_TIMEOUT, self.child.wait()).await {
            Ok(Ok(_)) => self.group = None,
            Ok(Err(error)) => tracing::warn!(%error, "cannot reap a killed CNI plugin"),
            Err(_) => tracing::warn!(pid = self.child.id(), "a killed CNI plugin does not end"),
        }
    }

    fn kill_group(&self) {
        if let Some(group) = self.group
            && let Err(errno) = killpg(group, Signal::SIGKILL)
            && errno != Errno::ESRCH
        {
            tracing::warn!(%errno, %group, "cannot kill a CNI plugin");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_group();
    }
}

async fn write_all(mut stdin: ChildStdin, input: &[u8]) -> io::Result<()> {
    match stdin.write_all(input).await {
        // It need not read: its exit status tells whether it should have.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

async fn read_bounded(stdout: impl AsyncRead + Unpin) -> Result<Vec<u8>, TalkError> {
    let mut bytes = Vec::new();
    let limit = MAX_OUTPUT as u64 + 1;
    stdout.take(limit).read_to_end(&mut bytes).await?;
    if bytes.len() > MAX_OUTPUT {
        return Err(TalkError::TooMuchOutput);
    }
    Ok(bytes)
}

/// Reads all and keeps the end.
async fn read_tail(mut stderr: impl AsyncRead + Unpin) -> io::Result<String> {
    let mut tail = Vec::new();
    let mut chunk = [0; STDERR_TAIL];
    loop {
        let read = stderr.read(&mut chunk).await?;
        if read == 0 {
            return Ok(String::from_utf8_lossy(&tail).trim().to_owned());
        }
        tail.extend_from_slice(&chunk[..read]);
        let surplus = tail.len().saturating_sub(STDERR_TAIL);
        tail.drain(..surplus);
    }
}

fn plugin_error(call: Call, status: ExitStatus, stdout: &[u8], stderr: String) -> CniError {
    #[derive(Deserialize)]
    struct Wire {
        code: u64,
        #[serde(default)]
        msg: String,
        #[serde(default)]
        details: String,
    }
    match serde_json::from_slice::<Wire>(stdout) {
        Ok(error) => CniError::Plugin {
            call,
            code: error.code,
            message: error.msg,
            details: error.details,
        },
        Err(_) => CniError::Exit {
            call,
            status,
            stderr: if stderr.is_empty() {
                "it gave no reason".to_owned()
            } else {
                stderr
            },
        },
    }
}
