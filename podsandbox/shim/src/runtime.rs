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
use tokio::time::{Instant, timeout_at};

/// What a runtime does takes tens of milliseconds; one that takes this long
/// hangs, in a mount perhaps.
const WORK: Duration = Duration::from_secs(12);
/// All that a request may take, undoing included: less than the 20 s that the
/// daemon waits for its answer.
const REQUEST: Duration = Duration::from_secs(18);
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
    #[error("the OCI runtime did not end its {call} in time ({seconds} s)")]
    TimedOut { call: &'static str, seconds: u64 },
    #[error("cannot {action} {path:?}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// When a request has to be answered, however many calls it takes.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    /// For what was asked.
    pub work: Instant,
    /// For undoing that, if it failed.
    pub end: Instant,
}

impl Deadline {
    #[must_use]
    pub fn of_request() -> Self {
        let now = Instant::now();
        Self {
            work: now + WORK,
            end: now + REQUEST,
        }
    }
}

/// What holds for a call of the runtime.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub until: Instant,
    /// What its process and all that it makes begin with. Not every runtime
    /// heeds what the description of a command says, and the supervisor's own
    /// is not for them.
    pub oom_score: Option<i32>,
}

impl From<Instant> for Terms {
    fn from(until: Instant) -> Self {
        Self {
            until,
            oom_score: None,
        }
    }
}

/// Standard input, output and error of a process.
pub type Files = [OwnedFd; 3];

/// A process that the runtime has left to us.
pub struct Made {
    pub pid: i32,
    pub exit: oneshot::Receiver<ExitCode>,
    /// Its PID namespace; none if it has ended already.
    pub namespace: Option<OwnedFd>,
}

impl Made {
    /// Kills it, unless it has ended and its id may be another's.
    pub fn kill(&self) {
        kill_unreaped(self.pid, &self.exit);
    }
}

/// The reaper tells of an exit in the step in which it reaps, so the id of a
/// process that it has not told of is its own, until this task yields.
pub fn kill_unreaped(pid: i32, exit: &oneshot::Receiver<ExitCode>) {
    if is_reaped(exit) {
        return;
    }
    if let Err(errno) = kill(Pid::from_raw(pid), Signal::SIGKILL) {
        tracing::warn!(pid, %errno, "cannot kill a process");
    }
}

fn is_reaped(exit: &oneshot::Receiver<ExitCode>) -> bool {
    exit.is_terminated() || !exit.is_empty()
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
        until: Instant,
    ) -> Result<Made, RuntimeError> {
        let pid_file = bundle.join("pid");
        let mut args = words(&["run", "--detach", "--bundle"]);
        args.extend([bundle.into(), "--pid-file".into(), pid_file.clone().into()]);
        let files = (console, files);
        self.make("run", args, files, id, &pid_file, until.into())
            .await
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
        terms: Terms,
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
        let files = (console, files);
        let made = self.make("exec", args, files, id, &pid_file, terms).await;
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
        (console, files): (Option<&Path>, Option<Files>),
        id: &str,
        pid_file: &Path,
        terms: Terms,
    ) -> Result<Made, RuntimeError> {
        if let Some(socket) = console {
            args.extend(["--console-socket".into(), socket.into()]);
        }
        args.push(id.into());
        let recording = self.reaper.record();
        let called = self.call(call, args, files, terms).await;
        let made = made(&recording, pid_file);
        match called {
            Ok(()) => made,
            Err(error) => {
                // It may have got that far before it was given up.
                if let Ok(made) = made {
                    made.kill();
                }
                Err(error)
            }
        }
    }

    /// Removes what the runtime keeps of a container, which is killed if it
    /// runs. One that it does not know is no error.
    pub async fn delete(&self, id: &str, until: Instant) -> Result<(), RuntimeError> {
        let args = words(&["delete", "--force", id]);
        self.call("delete", args, None, until.into()).await
    }

    /// Changes limits; `resources` is a file of OCI `LinuxResources`.
    pub async fn update(
        &self,
        id: &str,
        resources: &Path,
        until: Instant,
    ) -> Result<(), RuntimeError> {
        let mut args = words(&["update", "--resources"]);
        args.extend([resources.into(), id.into()]);
        self.call("update", args, None, until.into()).await
    }

    /// What this runtime can do about an exec's control group.
    pub async fn sub_cgroup(
        &self,
        unified: bool,
        until: Instant,
    ) -> Result<SubCgroup, RuntimeError> {
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
            let args = words(&["exec", "--help"]);
            self.call("exec --help", args, Some(files), until.into())
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
        terms: Terms,
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
        let outcome = self.wait(call, command, &log, terms).await;
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
        terms: Terms,
    ) -> Result<(), RuntimeError> {
        let begun = Instant::now();
        let timed_out = || RuntimeError::TimedOut {
            call,
            seconds: begun.elapsed().as_secs(),
        };
        if begun >= terms.until {
            return Err(timed_out());
        }
        let child = command.spawn().map_err(|source| RuntimeError::Run {
            program: self.program.clone(),
            source,
        })?;
        // Its ends of the streams are to be the child's alone.
        drop(command);
        let pid = child.id().cast_signed();
        let mut exit = self.reaper.watch(pid);
        let path = format!("/proc/{pid}/oom_score_adj");
        if let Some(score) = terms.oom_score
            && let Err(error) = fs::write(path, score.to_string())
        {
            tracing::warn!(%error, "a command has its supervisor's OOM score");
        }
        // The reaper never drops a sender before it has used it.
        let code = match timeout_at(terms.until, &mut exit).await {
            Ok(code) => code.unwrap_or(ExitCode::KILLED),
            Err(_) => {
                kill_unreaped(pid, &exit);
                drop(exit.await);
                return Err(timed_out());
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
    // Opened by number while the number is its own.
    let namespace = match File::open(format!("/proc/{pid}/ns/pid")) {
        Ok(file) if !is_reaped(&exit) => Some(file.into()),
        Ok(_) => None,
        Err(error) => {
            tracing::debug!(pid, %error, "a process ended before its namespace was opened");
            None
        }
    };
    Ok(Made {
        pid,
        exit,
        namespace,
    })
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
    use crate::ALONE;

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

    #[tokio::test(flavor = "current_thread")]
    async fn a_process_that_ended_before_it_was_known_has_its_exit() {
        let _alone = ALONE.lock().await;
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let dir = tempfile::tempdir().unwrap();
        // It leaves us a process that has ended when its id is told.
        let program = script(
            dir.path(),
            "#!/bin/sh\nwhile [ $# -gt 0 ]; do [ \"$1\" = --pid-file ] && file=$2; shift; done\n\
             mkfifo gate; (sh -c 'read word < gate; exit 6' & echo $! > \"$file.new\")\n\
             pid=$(cat \"$file.new\"); echo go > gate\n\
             while [ -e \"/proc/$pid\" ]; do :; done; mv \"$file.new\" \"$file\"\n",
        );
        let runtime = Runtime::new(program, dir.path().into(), Reaper::start().unwrap());
        let made = runtime
            .run("c", dir.path(), None, None, Deadline::of_request().work)
            .await
            .unwrap();
        assert_eq!(made.exit.await.unwrap(), ExitCode(6));
        nix::sys::prctl::set_child_subreaper(false).unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_process_that_the_runtime_itself_has_reaped_is_not_waited_for() {
        let _alone = ALONE.lock().await;
        let dir = tempfile::tempdir().unwrap();
        let program = script(
            dir.path(),
            "#!/bin/sh\nwhile [ $# -gt 0 ]; do [ \"$1\" = --pid-file ] && file=$2; shift; done\n\
             sh -c 'exit 6' & echo $! > \"$file\"; wait\n",
        );
        let runtime = Runtime::new(program, dir.path().into(), Reaper::start().unwrap());
        let made = runtime
            .run("c", dir.path(), None, None, Deadline::of_request().work)
            .await
            .unwrap();
        assert_eq!(made.exit.await.unwrap(), ExitCode::UNKNOWN);
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
        let until = Deadline::of_request().end;
        let refused = runtime.delete("c", until).await.unwrap_err();
        assert_eq!(refused.to_string(), "no such thing");
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no log is left"
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_call_that_hangs_is_given_up_with_what_it_has_made() {
        let _alone = ALONE.lock().await;
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let program = script(
            dir.path(),
            "#!/bin/sh\nwhile [ $# -gt 0 ]; do [ \"$1\" = --pid-file ] && file=$2; shift; done\n\
             sleep 1000 & echo $! > \"$file\"; echo $! > made; exec sleep 1000\n",
        );
        let reaper = Reaper::start().unwrap();
        let runtime = Runtime::new(program, dir.path().into(), reaper.clone());
        let description = dir.path().join("exec-0.json");
        let until = Instant::now() + Duration::from_secs(2);
        let made = runtime.exec("c", &description, None, None, None, until.into());
        let error = made.await.err().unwrap();
        assert!(matches!(error, RuntimeError::TimedOut { .. }), "{error}");
        let pid = fs::read_to_string(dir.path().join("made")).unwrap();
        let process = Path::new("/proc").join(pid.trim());
        while process.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let before = fs::read_dir(dir.path()).unwrap().count();
        // What is asked for too late is not begun.
        let late = runtime.delete("c", Instant::now()).await.unwrap_err();
        assert!(matches!(late, RuntimeError::TimedOut { .. }), "{late}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before);
        nix::sys::prctl::set_child_subreaper(false).unwrap();
    }
}
