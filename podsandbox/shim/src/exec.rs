//! Commands in a running container, each a process that the runtime makes and
//! leaves to us.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use agent_api::{ExecRequest, ExecSyncRequest, Streams};
use drupe_agent::container::exec::{self, Ends, Output, Running};
use drupe_agent::container::session::Events;
use drupe_agent::container::stdio::{Source, StdioError};
use drupe_agent::reaper::ExitCode;
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tokio::time::Instant;

use crate::cgroup::Group;
use crate::container::Container;
use crate::error::Error;
use crate::pod::{Containers, write};
use crate::runtime::{Deadline, SubCgroup, Terms, kill_unreaped};
use crate::start::Wiring;

/// Commands in the whole pod at once: probes of every container, and as many
/// sessions as people and tools have.
pub const MAX_EXECS: usize = 256;

struct Wish<'a> {
    argv: &'a [String],
    terminal: bool,
    /// Reads from a pipe; a terminal is read from either way.
    stdin: bool,
}

/// A command that runs.
struct Command {
    container: Arc<Container>,
    /// Its own, where the runtime can give it one.
    cgroup: Option<Group>,
    pid: i32,
    exit: oneshot::Receiver<ExitCode>,
    ended: watch::Sender<bool>,
    ends: Ends,
    _permit: OwnedSemaphorePermit,
}

impl Containers {
    /// Starts the command; fails if it cannot be run. The command is killed
    /// when the receiver is dropped before its last event.
    pub async fn exec_sync(&self, request: ExecSyncRequest) -> Result<Output, Error> {
        let container = self.get(&request.container_id)?;
        container.check_running()?;
        let permit = self.exec_permit()?;
        let containers = self.clone();
        // Spawned so that a caller who gives up leaves nothing half made.
        tokio::spawn(async move {
            let wish = Wish {
                argv: &request.argv,
                terminal: false,
                stdin: false,
            };
            let command = containers.command(container, wish, permit).await?;
            Ok(exec::answer(command, request.timeout_millis))
        })
        .await?
    }

    /// Makes a command ready that starts once its streams are connected. It is
    /// killed when the receiver is dropped before its last event.
    pub fn exec(&self, request: ExecRequest) -> Result<Events<Error>, Error> {
        let container = self.get(&request.container_id)?;
        container.check_running()?;
        let permit = self.exec_permit()?;
        let (client, events) = self.inner.sessions.begin()?;
        let containers = self.clone();
        let (streams, terminal) = (request.streams.unwrap_or_default(), request.terminal);
        let begin = async move |streams: Streams| {
            let wish = Wish {
                argv: &request.argv,
                terminal,
                stdin: streams.stdin,
            };
            containers.command(container, wish, permit).await
        };
        tokio::spawn(exec::serve(begin, streams, terminal, client));
        Ok(events)
    }

    fn exec_permit(&self) -> Result<OwnedSemaphorePermit, Error> {
        let permit = self.inner.execs.clone().try_acquire_owned();
        permit.map_err(|_| Error::TooManyExecs)
    }

    /// Leaves nothing when it fails. Not to be cancelled.
    async fn command(
        &self,
        container: Arc<Container>,
        wish: Wish<'_>,
        permit: OwnedSemaphorePermit,
    ) -> Result<Command, Error> {
        let deadline = Deadline::of_request();
        container.check_running()?;
        let number = container.execs.fetch_add(1, Ordering::Relaxed);
        let name = format!("exec-{number}");
        let description = container.bundle.join(format!("{name}.json"));
        let unified = self.inner.layout == crate::cgroup::Layout::Unified;
        let placed = match self
            .inner
            .runtime
            .sub_cgroup(unified, deadline.work)
            .await?
        {
            SubCgroup::Never => None,
            SubCgroup::Path | SubCgroup::InHierarchy => Some(container.cgroup.make_below(&name)?),
        };
        let word = placed.as_ref().map(|(_, word)| word.as_str());
        let until = deadline.work;
        let begun = self
            .begin(&container, &wish, &description, word, until)
            .await;
        if let Err(error) = fs::remove_file(&description) {
            tracing::debug!(?description, %error, "cannot remove a command's description");
        }
        let cgroup = placed.map(|(group, _)| group);
        match begun {
            Ok((pid, exit, ended, ends)) => Ok(Command {
                container,
                cgroup,
                pid,
                exit,
                ended,
                ends,
                _permit: permit,
            }),
            Err(error) => {
                if let Some(group) = cgroup
                    && let Err(undo) = clear(&group).await
                {
                    tracing::warn!(container = container.id, error = %undo, "a command is left");
                }
                // One that has ended meanwhile takes its commands along.
                container.check_running()?;
                Err(error)
            }
        }
    }

    async fn begin(
        &self,
        container: &Container,
        wish: &Wish<'_>,
        description: &Path,
        sub_cgroup: Option<&str>,
        until: Instant,
    ) -> Result<(i32, oneshot::Receiver<ExitCode>, watch::Sender<bool>, Ends), Error> {
        let mut process = container.process.clone();
        process.set_args(Some(wish.argv.to_vec()));
        process.set_terminal(Some(wish.terminal));
        if let Some(score) = *container.oom_score() {
            process.set_oom_score_adj(Some(score));
        }
        let terms = Terms {
            until,
            oom_score: process.oom_score_adj(),
        };
        let mut env = process.env().clone().unwrap_or_default();
        if wish.terminal && !env.iter().any(|entry| entry.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
            process.set_env(Some(env));
        }
        write(description, &serde_json::to_vec(&process)?)?;
        let socket = description.with_extension("tty");
        let terminal = wish.terminal.then_some(socket.as_path());
        let mut wiring = Wiring::lay(terminal, container.user.uid, wish.stdin)?;
        let files = wiring.files.take();
        let made = self.inner.runtime.exec(
            &container.id,
            description,
            sub_cgroup,
            wiring.socket(),
            files,
            terms,
        );
        let made = made.await?;
        // Not every runtime heeds the description's.
        let score = *container.oom_score();
        if let Some(score) = score
            && let Err(error) = container.cgroup.set_oom_score(score)
        {
            tracing::warn!(container = container.id, %error, "a command keeps its container's first OOM score");
        }
        let ended = watch::Sender::new(false);
        let ends = async {
            wiring.take_terminal(true, until).await?;
            let mut outputs = Vec::new();
            for (stream, fd) in wiring.outputs {
                let source = Source::new(fd, ended.subscribe()).map_err(StdioError::Create)?;
                outputs.push((stream, source));
            }
            Ok::<_, Error>(Ends {
                stdin: wiring.stdin,
                outputs,
                terminal: wiring.master.map(Arc::new),
            })
        };
        match ends.await {
            Ok(ends) => Ok((made.pid, made.exit, ended, ends)),
            Err(error) => {
                made.kill();
                Err(error)
            }
        }
    }
}

async fn clear(group: &Group) -> Result<(), crate::cgroup::CgroupError> {
    group.kill().await?;
    group.remove().map(drop)
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
                kill_unreaped(self.pid, &self.exit);
                if let Some(group) = &self.cgroup
                    && let Err(error) = group.kill().await
                {
                    tracing::warn!(container = self.container.id, %error, "a command is left");
                }
                (&mut self.exit).await
            }
        };
        self.ended.send_replace(true);
        // The reaper never drops a sender before it has used it.
        code.unwrap_or(ExitCode::KILLED)
    }

    /// What it left running in the background stays, in its group, until the
    /// container goes.
    async fn clear(self) {
        if let Some(Err(error)) = self.cgroup.map(|group| group.remove()) {
            tracing::warn!(container = self.container.id, %error, "a command's group stays");
        }
    }
}
