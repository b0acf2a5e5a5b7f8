//! The OCI runtime as a program: runc, crun, or another with their command
//! line. Each call is a process of its own, waited for by the reaper; the
//! containers it makes are this process's children once it has ended.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use drupe_agent::reaper::{ExitCode, Reaper, Recording};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::{OnceCell, oneshot};
use tokio::time::timeout;

/// What a runtime does takes tens of milliseconds; one that takes this long
/// hangs, in a mount perhaps. Less than the daemon waits for.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// Of the runtime's own log that is read for its error.
const MAX_LOG: u64 = 64 * 1024;
const MAX_MESSAGE: usize = 2048;
const MAX_PID_FILE: u64 = 32;

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("cannot run {program:?}")]
    Run { program: PathBuf, source: io::Error },
    /// In the runtime's words.
    #[error("{message}")]
    Refused { message: String },
    #[error("the OCI runtime did not end its {call} in {} s", CALL_TIMEOUT.as_secs())]
    TimedOut { call: &'static str },
    #[error("cannot {action} {path:?}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// Standard input, output and error of a process.
pub type Files = [OwnedFd; 3];

/// A process that the runtime has left to us.
pub struct Made {
    pub pid: i32,
    pub exit: oneshot::Receiver<ExitCode>,
}

/// How an exec can be given a control group of its own, to be killed with all
/// that it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubCgroup {
    /// By its path below the container's.
    Path,
    /// And that in one of v1's hierarchies.
    InHierarchy,
    Never,
}

pub struct Runtime {
    program: PathBuf,
    /// Where it keeps its own notes, and where we keep its words.
    dir: PathBuf,
    reaper: Reaper,
    calls: AtomicU64,
    sub_cgroup: OnceCell<SubCgroup>,
}

impl Runtime {
    pub fn new(program: PathBuf, dir: PathBuf, reaper: Reaper) -> Self {
        Self {
            program,
            dir,
            reaper,
            calls: AtomicU64::new(0),
            sub_cgroup: OnceCell::new(),
        }
    }

    /// Makes and starts the container of a bundle. What a failure leaves is
    /// [`Runtime::delete`]'s.
    pub async fn run(
        &self,
        id: &str,
        bundle: &Path,
        console: Option<&Path>,
        files: Option<Files>,
    ) -> Result<Made, RuntimeError> {
        let pid_file = bundle.join("pid");
        let mut args = words(&["run", "--detach", "--bundle"]);
        args.extend([bundle.into(), "--pid-file".into(), pid_file.clone().into()]);
        self.make("run", args, console, files, id, &pid_file).await
    }

    /// Runs a process, described by an OCI spec's `process` in `description`,
    /// in a container.
    pub async fn exec(
        &self,
        id: &str,
        description: &Path,
        sub_cgroup: Option<&str>,
        console: Option<&Path>,
        files: Option<Files>,
    ) -> Result<Made, RuntimeError> {
        let pid_file = description.with_extension("pid");
        let mut args = words(&["exec", "--detach", "--process"]);
        args.extend([
            description.into(),
            "--pid-file".into(),
            pid_file.clone().into(),
        ]);
        if let Some(group) = sub_cgroup {
            args.extend(words(&["--cgroup", group]));
        }
        let made = self.make("exec", args, console, files, id, &pid_file).await;
        match fs::remove_file(&pid_file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(?pid_file, %error, "cannot remove a command's pid file");
            }
            _ => {}
        }
        made
    }

    async fn make(
        &self,
        call: &'static str,
        mut args: Vec<OsString>,
        console: Option<&Path>,
        files: Option<Files>,
        id: &str,
        pid_file: &Path,
    ) -> Result<Made, RuntimeError> {
        if let Some(socket) = console {
            args.extend(["--console-socket".into(), socket.into()]);
        }
        args.push(id.into());
        let recording = self.reaper.record();
        self.call(call, args, files).await?;
        made(&recording, pid_file)
    }

    /// Removes what the runtime keeps of a container, which is killed if it
    /// runs. One that it does not know is no error.
    pub async fn delete(&self, id: &str) -> Result<(), RuntimeError> {
        let args = words(&["delete", "--force", id]);
        self.call("delete", args, None).await
    }

    /// Changes limits; `resources` is a file of OCI `LinuxResources`.
    pub async fn update(&self, id: &str, resources: &Path) -> Result<(), RuntimeError> {
        let mut args = words(&["update", "--resources"]);
        args.extend([resources.into(), id.into()]);
        self.call("update", args, None).await
    }

    /// What this runtime can do about an exec's control group.
    pub async fn sub_cgroup(&self, unified: bool) -> Result<SubCgroup, RuntimeError> {
        let probe = async {
            let path = self.dir.join("exec-help");
            let file = |source| RuntimeError::File {
                action: "write",
                path: path.clone(),
                source,
            };
            let out = File::create(&path).map_err(file)?;
            let null = || File::options().read(true).write(true).open("/dev/null");
            let files = [
                null().map_err(file)?.into(),
                out.into(),
                null().map_err(file)?.into(),
            ];
            self.call("exec --help", words(&["exec", "--help"]), Some(files))
                .await?;
            let help = fs::read_to_string(&path).map_err(file)?;
            Ok(can_place(&help, unified))
        };
        self.sub_cgroup.get_or_try_init(|| probe).await.copied()
    }

    async fn call(
        &self,
        call: &'static str,
        args: Vec<OsString>,
        files: Option<Files>,
    ) -> Result<(), RuntimeError> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let log = self.dir.join(format!("call-{number}.log"));
        let mut command = Command::new(&self.program);
        command
            .arg("--root")
            .arg(self.dir.join("state"))
            .arg("--log")
            .arg(&log)
            .args(["--log-format", "json"])
            .args(args)
            .current_dir(&self.dir);
        match files {
            Some([input, output, errors]) => {
                command.stdin(input).stdout(output).stderr(errors);
            }
            None => {
                command.stdin(Stdio::null());
                command.stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        let outcome = self.wait(call, command, &log).await;
        match fs::remove_file(&log) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(?log, %error, "cannot remove the runtime's log");
            }
            _ => {}
        }
        outcome
    }

    async fn wait(
        &self,
        call: &'static str,
        mut command: Command,
        log: &Path,
    ) -> Result<(), RuntimeError> {
        let child = command.spawn().map_err(|source| RuntimeError::Run {
            program: self.program.clone(),
            source,
        })?;
        // Its ends of the streams are to be the child's alone.
        drop(command);
        let pid = Pid::from_raw(child.id().cast_signed());
        let mut exit = self.reaper.watch(pid.as_raw());
        // The reaper never drops a sender before it has used it.
        let code = match timeout(CALL_TIMEOUT, &mut exit).await {
            Ok(code) => code.unwrap_or(ExitCode::KILLED),
            Err(_) => {
                // Not reaped, so the id is its own.
                if let Err(error) = kill(pid, Signal::SIGKILL) {
                    tracing::warn!(%error, "cannot kill an OCI runtime that hangs");
                }
                drop(exit.await);
                return Err(RuntimeError::TimedOut { call });
            }
        };
        if code == ExitCode(0) {
            return Ok(());
        }
        Err(RuntimeError::Refused {
            message: last_error(log).unwrap_or_else(|| {
                let program = self.program.display();
                format!("{program} {call} ended with {}", code.0)
            }),
        })
    }
}

fn words(args: &[&str]) -> Vec<OsString> {
    args.iter().map(|arg| OsStr::new(arg).to_owned()).collect()
}

fn made(recording: &Recording, pid_file: &Path) -> Result<Made, RuntimeError> {
    let bad = |source| RuntimeError::File {
        action: "read",
        path: pid_file.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = File::open(pid_file).map_err(bad)?;
    let mut file = file.take(MAX_PID_FILE);
    file.read_to_string(&mut text).map_err(bad)?;
    let pid = text.trim().parse().ok().filter(|pid| *pid > 1);
    let pid = pid.ok_or_else(|| bad(io::ErrorKind::InvalidData.into()))?;
    let exit = recording.watch(pid);
    Ok(Made { pid, exit })
}

/// The last error of a log of JSON objects, one a line.
fn last_error(log: &Path) -> Option<String> {
    let mut text = String::new();
    let file = File::open(log).ok()?;
    file.take(MAX_LOG).read_to_string(&mut text).ok()?;
    let message = text.lines().rev().find_map(|line| {
        let entry: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_error = matches!(entry["level"].as_str(), Some("error" | "fatal") | None);
        let message = entry["msg"].as_str().filter(|_| is_error)?;
        Some(message.trim().replace('\n', " "))
    })?;
    let end = message.floor_char_boundary(MAX_MESSAGE);
    Some(message[..end].to_owned())
}

/// runc's help says that a hierarchy may be named; crun's does not.
fn can_place(help: &str, unified: bool) -> SubCgroup {
    match (
        help.contains("--cgroup"),
        help.contains("controller"),
        unified,
    ) {
        (true, _, true) => SubCgroup::Path,
        (true, true, false) => SubCgroup::InHierarchy,
        _ => SubCgroup::Never,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_log_is_told() {
        let log = tempfile::NamedTempFile::new().unwrap();
        fs::write(
            log.path(),
            "{\"level\":\"warning\",\"msg\":\"w\"}\n{\"level\":\"error\",\"msg\":\"first\\nline\"}\n\
             {\"level\":\"info\",\"msg\":\"i\"}\nno json\n",
        )
        .unwrap();
        assert_eq!(last_error(log.path()).unwrap(), "first line");
        fs::write(log.path(), "").unwrap();
        assert_eq!(last_error(log.path()), None);
    }

    #[test]
    fn an_exec_gets_a_group_of_its_own_where_the_runtime_can() {
        let runc = "--cgroup value  run the process in an (existing) sub-cgroup(s). Format is [<controller>:]<cgroup>.";
        let crun = "      --cgroup=PATH        sub-cgroup in the container";
        assert_eq!(can_place(runc, true), SubCgroup::Path);
        assert_eq!(can_place(runc, false), SubCgroup::InHierarchy);
        assert_eq!(can_place(crun, true), SubCgroup::Path);
        assert_eq!(can_place(crun, false), SubCgroup::Never);
        assert_eq!(can_place("", true), SubCgroup::Never);
    }

    fn script(dir: &Path, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("runtime");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// A reaper takes every child of the process: one test at a time.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    #[tokio::test(flavor = "current_thread")]
    async fn a_process_that_ended_before_it_was_known_has_its_exit() {
        let _alone = ALONE.lock().await;
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let dir = tempfile::tempdir().unwrap();
        // It leaves us a process that has ended when its id is told.
        let program = script(
            dir.path(),
            "#!/bin/sh\nwhile [ $# -gt 0 ]; do [ \"$1\" = --pid-file ] && file=$2; shift; done\n\
             (sh -c 'exit 6' & echo $! > \"$file.new\"); pid=$(cat \"$file.new\")\n\
             while [ -e \"/proc/$pid\" ]; do :; done; mv \"$file.new\" \"$file\"\n",
        );
        let runtime = Runtime::new(program, dir.path().into(), Reaper::start().unwrap());
        let made = runtime.run("c", dir.path(), None, None).await.unwrap();
        assert_eq!(made.exit.await.unwrap(), ExitCode(6));
        nix::sys::prctl::set_child_subreaper(false).unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_refusal_is_in_the_runtimes_words() {
        let _alone = ALONE.lock().await;
        let dir = tempfile::tempdir().unwrap();
        let program = script(
            dir.path(),
            "#!/bin/sh\necho '{\"level\":\"error\",\"msg\":\"no such thing\"}' > \"$4\"; exit 1\n",
        );
        let runtime = Runtime::new(program, dir.path().into(), Reaper::start().unwrap());
        let refused = runtime.delete("c").await.unwrap_err();
        assert_eq!(refused.to_string(), "no such thing");
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no log is left"
        );
    }
}
