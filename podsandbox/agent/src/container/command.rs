//! A command in a running container, from its start to the last trace of it.

use std::ffi::CString;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tokio::time::timeout;

use super::create::SETUP_TIMEOUT;
use super::exec::{Ends, Running};
use super::instance::Phase;
use super::launch::{self, LaunchError, Launched, PidNamespace};
use super::plan::{Entry, Plan, Stdio, StringArray};
use super::spec::Pids;
use super::stdio::{self, Source, StdioError};
use super::{Container, Containers, Error, spec};
use crate::cgroup::Cgroup;
use crate::reaper::ExitCode;

/// Commands in the whole guest at once: probes of every container, and as many
/// sessions as people and tools have.
pub const MAX_EXECS: usize = 256;

pub struct Wish<'a> {
    pub argv: &'a [String],
    pub terminal: bool,
    /// Rows and columns of the terminal; 0 where they are not known.
    pub size: (u16, u16),
    /// Reads from a pipe; a terminal is read from either way.
    pub stdin: bool,
}

/// A command that runs.
pub struct Command {
    container: Arc<Container>,
    cgroup: Cgroup,
    process: Launched,
    exit: oneshot::Receiver<ExitCode>,
    ended: watch::Sender<bool>,
    ends: Ends,
    _permit: OwnedSemaphorePermit,
}

struct Begun {
    process: Launched,
    exit: oneshot::Receiver<ExitCode>,
    ended: watch::Sender<bool>,
    ends: Ends,
}

impl Containers {
    /// A place among the commands.
    pub(super) fn exec_permit(&self) -> Result<OwnedSemaphorePermit, Error> {
        let permit = self.inner.execs.clone().try_acquire_owned();
        permit.map_err(|_| Error::TooManyExecs)
    }

    /// Leaves nothing when it fails. Not to be cancelled.
    pub(super) async fn command(
        &self,
        container: Arc<Container>,
        wish: Wish<'_>,
        permit: OwnedSemaphorePermit,
    ) -> Result<Command, Error> {
        container.check_takes_commands()?;
        let cgroup = container
            .cgroup
            .child(&format!("exec-{}", container.next_exec()))?;
        match self.begin(&container, &wish, &cgroup).await {
            Ok(begun) => Ok(Command {
                container,
                cgroup,
                process: begun.process,
                exit: begun.exit,
                ended: begun.ended,
                ends: begun.ends,
                _permit: permit,
            }),
            Err(error) => {
                if let Err(undo) = cgroup.kill().await.and_then(|()| cgroup.remove()) {
                    eprintln!("drupe-agent: container {}: {undo}", container.id);
                }
                Err(error)
            }
        }
    }

    async fn begin(
        &self,
        container: &Container,
        wish: &Wish<'_>,
        cgroup: &Cgroup,
    ) -> Result<Begun, Error> {
        let users = self.user_for(container.guest);
        let (stdio, mut stdin, outputs) = if wish.terminal {
            let (rows, columns) = wish.size;
            let stdio = Stdio::Terminal {
                rows,
                columns,
                console: false,
            };
            (stdio, None, Vec::new())
        } else {
            let uid = container.identity.uid;
            // It was there when the container was made.
            let owner = users.and_then(|users| users.ids().in_guest(uid));
            let streams = stdio::streams(owner.unwrap_or(uid), wish.stdin)?;
            (Stdio::Files(streams.child), streams.stdin, streams.outputs)
        };
        let (ours, theirs) = launch::channel()?;
        let cgroup_namespace = if container.namespaces.cgroup {
            libc::CLONE_NEWCGROUP
        } else {
            0
        };
        let target = container
            .process
            .pidfd
            .try_clone()
            .map_err(StdioError::Create)?;
        let envp = if wish.terminal {
            with_term(&container.envp)
        } else {
            container.envp.clone()
        };
        let plan = Plan {
            user: users.cloned(),
            entry: Entry::Join {
                pidfd: target,
                namespaces: libc::CLONE_NEWNS | cgroup_namespace,
            },
            identity: container.identity(),
            program: spec::program(wish.argv, envp)?,
            stdio,
            channel: theirs,
            // For the terminal's master to come.
            wait: wish.terminal,
        };
        let pause;
        let pid = match &container.namespaces.pid {
            Pids::Own | Pids::Of(_) => PidNamespace::Join(container.process.pidfd.as_fd()),
            Pids::Shared => {
                pause = self.share_pid_namespace()?;
                PidNamespace::Join(pause.pidfd())
            }
            Pids::Guest => PidNamespace::Guest,
        };
        let process = launch::launch(plan, ours, pid, false, cgroup.dir().as_fd())?;
        let exit = self.inner.reaper.watch(process.pid);

        let ended = watch::Sender::new(false);
        let source = |fd| Source::new(fd, ended.subscribe()).map_err(StdioError::Create);
        let mut sources = Vec::new();
        for (stream, fd) in outputs {
            sources.push((stream, source(fd)?));
        }
        let mut terminal = None;
        if wish.terminal {
            let ready = timeout(SETUP_TIMEOUT, process.ready()).await;
            let ready = ready.map_err(|_| Error::SetupTimeout)?;
            let master = ready.map_err(|error| explain(container, error))?;
            let master = master.ok_or(LaunchError::Vanished)?;
            fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(|errno| StdioError::Create(errno.into()))?;
            let copy = || master.try_clone().map_err(StdioError::Create);
            stdin = Some(copy()?);
            terminal = Some(Arc::new(copy()?));
            sources.push(("stdout", source(master)?));
            process.go().map_err(|error| explain(container, error))?;
        }
        let executed = process.executed().await;
        executed.map_err(|error| explain(container, error))?;
        Ok(Begun {
            process,
            exit,
            ended,
            ends: Ends {
                stdin,
                outputs: sources,
                terminal,
            },
        })
    }
}

/// A container that has ended meanwhile takes its namespaces along.
fn explain(container: &Container, error: LaunchError) -> Error {
    match error {
        LaunchError::Vanished if *container.ended.borrow() => Error::Phase {
            id: container.id.clone(),
            phase: Phase::Exited.name(),
            wanted: Phase::Running.name(),
        },
        error => error.into(),
    }
}

/// What a terminal is called where the container does not say.
fn with_term(envp: &Arc<StringArray>) -> Arc<StringArray> {
    let known = |entry: &CString| entry.as_bytes().starts_with(b"TERM=");
    if envp.strings().iter().any(known) {
        return envp.clone();
    }
    let mut strings = envp.strings().to_vec();
    strings.push(c"TERM=xterm".to_owned());
    Arc::new(StringArray::new(strings))
}

impl Running for Command {
    fn take_ends(&mut self) -> Ends {
        std::mem::take(&mut self.ends)
    }

    async fn exited(&mut self, stop: impl Future<Output = ()> + Send) -> ExitCode {
        let code = tokio::select! {
            biased;
            code = &mut self.exit => Some(code),
            () = stop => None,
        };
        let code = match code {
            Some(code) => code,
            None => {
                if let Err(error) = self.cgroup.kill().await {
                    eprintln!("drupe-agent: container {}: {error}", self.container.id);
                }
                (&mut self.exit).await
            }
        };
        self.ended.send_replace(true);
        // The reaper never drops a sender before it has used it.
        code.unwrap_or(ExitCode::KILLED)
    }

    /// What it left running in the background stays, in its cgroup, until the
    /// container goes.
    async fn clear(self) {
        drop(self.process);
        if let Err(error) = self.cgroup.remove() {
            let busy = matches!(&error, crate::cgroup::CgroupError::Remove { source, .. }
                if source.raw_os_error() == Some(libc::EBUSY));
            if !busy {
                eprintln!("drupe-agent: container {}: {error}", self.container.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_has_a_name_unless_the_container_gave_it_one() {
        let envp = |entries: &[&str]| {
            let strings = entries.iter().map(|&entry| CString::new(entry).unwrap());
            Arc::new(StringArray::new(strings.collect()))
        };
        let with = with_term(&envp(&["PATH=/bin"]));
        assert_eq!(
            with.strings(),
            [c"PATH=/bin".into(), c"TERM=xterm".to_owned()]
        );
        let with = with_term(&envp(&["TERM=vt100"]));
        assert_eq!(with.strings(), [c"TERM=vt100".to_owned()]);
    }
}
