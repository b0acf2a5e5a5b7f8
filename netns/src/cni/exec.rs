//! Runs one plugin once: environment in, JSON in, JSON out, bounded in size
//! and time (CNI 1.1, section 2).

use std::{
    convert::Infallible,
    ffi::OsString,
    future::pending,
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
    net::unix::pipe::{self, Receiver},
    process::{Child, ChildStdin, Command},
    time::{Instant, sleep, timeout},
};

use super::{
    config::find_plugin,
    error::{Call, CniError},
    lock::RunLock,
};

/// A result is a page of JSON.
pub(crate) const MAX_OUTPUT: usize = 1024 * 1024;
/// How much of the end of standard error is kept for the error's text.
const STDERR_TAIL: usize = 4096;
/// What a pipe holds at most, unless somebody enlarged it.
const PIPE_BYTES: usize = 64 * 1024;
/// A killed process is gone at once unless the kernel holds it; then it is
/// left to the runtime to reap.
pub(crate) const REAP_TIMEOUT: Duration = Duration::from_secs(2);
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

/// The pod's side of a run.
pub(crate) struct Pod<'a> {
    pub(crate) target: Target<'a>,
    /// Held by the plugin, too, until it ends.
    pub(crate) lock: &'a mut RunLock,
}

impl Runner {
    /// Runs plugin `kind` and returns what it wrote. Dropping the future kills
    /// the plugin.
    pub(crate) async fn run(
        &self,
        verb: Verb,
        kind: &str,
        pod: Option<Pod<'_>>,
        input: &[u8],
    ) -> Result<Vec<u8>, CniError> {
        let target = pod.as_ref().map(|pod| pod.target);
        let call = Call {
            plugin: kind.to_owned(),
            verb,
            sandbox: target.map(|target| target.sandbox_id.to_owned()),
        };
        let program = find_plugin(kind, &self.bin_dirs).ok_or_else(|| CniError::NoPlugin {
            plugin: kind.to_owned(),
            dirs: self.bin_dirs.clone(),
        })?;
        let mut own;
        let streams = match pod {
            Some(pod) => pod.lock.stderr(),
            None => match own_stderr() {
                Ok((stdio, reader)) => {
                    own = reader;
                    Ok((stdio, &mut own))
                }
                Err(error) => Err(error),
            },
        };
        let (stdio, stderr) = match streams {
            Ok(streams) => streams,
            Err(source) => return Err(CniError::Spawn { call, source }),
        };
        let mut command = self.command(verb, &program, target);
        command.stderr(stdio);
        let started = Instant::now();
        let mut running = match spawn(&mut command).await {
            Ok(child) => Running::new(child),
            Err(source) => return Err(CniError::Spawn { call, source }),
        };
        let ended = timeout(self.timeout, running.talk(input, stderr)).await;
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

/// A pipe of the same kind as a lock's.
fn own_stderr() -> io::Result<(Stdio, Receiver)> {
    let (sender, receiver) = pipe::pipe()?;
    Ok((sender.into_blocking_fd()?.into(), receiver))
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

    async fn talk(
        &mut self,
        input: &[u8],
        stderr: &mut Receiver,
    ) -> Result<(ExitStatus, Vec<u8>, String), TalkError> {
        let missing = || io::Error::other("the plugin's standard streams are gone");
        let stdin = self.child.stdin.take().ok_or_else(missing)?;
        let stdout = self.child.stdout.take().ok_or_else(missing)?;
        let mut tail = Tail::default();
        let ended = async {
            let ((), stdout) = tokio::try_join!(
                async { write_all(stdin, input).await.map_err(TalkError::from) },
                read_bounded(stdout),
            )?;
            Ok::<_, TalkError>((self.child.wait().await?, stdout))
        };
        let (status, stdout) = tokio::select! {
            ended = ended => ended?,
            never = tail.follow(stderr) => match never? {},
        };
        self.group = None;
        tail.take(stderr)?;
        Ok((status, stdout, tail.text()))
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

/// Reads to the end of file and keeps the last of it.
pub(crate) async fn read_tail(mut stderr: Receiver) -> io::Result<String> {
    let mut tail = Tail::default();
    let mut chunk = [0; STDERR_TAIL];
    loop {
        match stderr.read(&mut chunk).await? {
            0 => return Ok(tail.text()),
            read => tail.push(&chunk[..read]),
        }
    }
}

/// The end of what a plugin wrote to its standard error.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    /// Reads while it is waited for; its end of file is no news.
    async fn follow(&mut self, stderr: &mut Receiver) -> io::Result<Infallible> {
        let mut chunk = [0; STDERR_TAIL];
        loop {
            match stderr.read(&mut chunk).await? {
                0 => pending().await,
                read => self.push(&chunk[..read]),
            }
        }
    }

    /// Reads what is left after the plugin's end.
    fn take(&mut self, stderr: &Receiver) -> io::Result<()> {
        let mut chunk = [0; STDERR_TAIL];
        // A service that the plugin left behind may write without end.
        for _ in 0..PIPE_BYTES / STDERR_TAIL {
            match stderr.try_read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(read) => self.push(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        let surplus = self.0.len().saturating_sub(STDERR_TAIL);
        self.0.drain(..surplus);
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).trim().to_owned()
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
