//! StartContainer: the runtime makes the process and runs it.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use drupe_agent::clock;
use drupe_agent::container::session::Host;
use drupe_agent::container::stdin::Stdin;
use drupe_agent::container::stdio::{self, Source, StdioError};
use drupe_vmm::logs::LogHandle;
use std::os::fd::OwnedFd;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::console::Console;
use crate::container::{Container, Phase, Terminals, Vigil, supervise};
use crate::error::Error;
use crate::pod::Containers;
use crate::runtime::{Deadline, Files, Made};

/// This side's ends of a process's streams, and what its runtime is given.
pub struct Wiring {
    pub console: Option<Console>,
    pub files: Option<Files>,
    pub stdin: Option<OwnedFd>,
    pub outputs: Vec<(&'static str, OwnedFd)>,
    /// The master of its terminal, once it is there.
    pub master: Option<OwnedFd>,
}

impl Wiring {
    pub fn lay(terminal: Option<&Path>, uid: u32, stdin: bool) -> Result<Self, Error> {
        if let Some(socket) = terminal {
            return Ok(Self {
                console: Some(Console::listen(socket.to_owned())?),
                files: None,
                stdin: None,
                outputs: Vec::new(),
                master: None,
            });
        }
        let streams = stdio::streams(uid, stdin)?;
        Ok(Self {
            console: None,
            files: Some(streams.child),
            stdin: streams.stdin,
            outputs: streams.outputs,
            master: None,
        })
    }

    pub fn socket(&self) -> Option<&Path> {
        self.console.as_ref().map(|console| console.path.as_path())
    }

    /// Takes the terminal that the runtime has sent by now.
    pub async fn take_terminal(&mut self, reads: bool, until: Instant) -> Result<(), Error> {
        let Some(console) = self.console.take() else {
            return Ok(());
        };
        let master = console.master(until).await?;
        let copy = || master.try_clone().map_err(StdioError::Create);
        self.stdin = reads.then(copy).transpose()?;
        self.outputs.push(("stdout", copy()?));
        self.master = Some(master);
        Ok(())
    }
}

impl Containers {
    /// Returns when it started. Runs to its end even when the caller gives up.
    pub async fn start(&self, id: &str) -> Result<i64, Error> {
        let container = self.get(id)?;
        let containers = self.clone();
        let deadline = Deadline::of_request();
        tokio::spawn(async move {
            let _starting = container.starting.lock().await;
            let phase = container.state().phase;
            if phase != Phase::Created {
                return Err(container.in_phase(phase, Phase::Created));
            }
            container.state().phase = Phase::Starting;
            match containers.launch(&container, deadline).await {
                Ok(started_at) => Ok(started_at),
                Err(error) => {
                    containers.clear(&container, deadline).await;
                    let why = drupe_agent::server::sentence(&error);
                    container.never_ran(&containers, None, why);
                    Err(error)
                }
            }
        })
        .await?
    }

    /// What a start that failed has left.
    async fn clear(&self, container: &Container, deadline: Deadline) {
        if let Err(error) = container.cgroup.kill().await {
            tracing::warn!(container = container.id, %error, "processes are left");
        }
        let runtime = &self.inner.runtime;
        if let Err(error) = runtime.delete(&container.id, deadline.end).await {
            tracing::warn!(container = container.id, %error, "the runtime keeps something");
        }
    }

    async fn launch(&self, container: &Arc<Container>, deadline: Deadline) -> Result<i64, Error> {
        let socket = container.bundle.join("tty");
        let terminal = container.is_terminal().then_some(socket.as_path());
        let mut wiring = Wiring::lay(terminal, container.user.uid, container.stdin)?;
        let mut hosts = Vec::new();
        let streams: &[&str] = if terminal.is_some() {
            &["stdout"]
        } else {
            &["stdout", "stderr"]
        };
        for stream in streams.iter().filter(|_| container.log) {
            hosts.push(connect(&self.inner.logs, &container.id, stream).await?);
        }
        let files = wiring.files.take();
        let made = self.inner.runtime.run(
            &container.id,
            &container.bundle,
            wiring.socket(),
            files,
            deadline.work,
        );
        let Made {
            pid,
            exit,
            namespace,
        } = made.await?;
        wiring.take_terminal(container.stdin, deadline.work).await?;
        let started_at = clock::now_nanos();
        let once = container.stdin_once && terminal.is_none();
        let stdin = wiring.stdin.map(|fd| Stdin::new(fd, once).map(Arc::new));
        let stdin = stdin.transpose().map_err(StdioError::Create)?;
        let mut sources = Vec::new();
        for (stream, fd) in wiring.outputs {
            let source = Source::new(fd, container.ended.subscribe());
            sources.push((stream, source.map_err(StdioError::Create)?));
        }
        let terminals = Terminals {
            stdin,
            terminal: wiring.master.map(Arc::new),
        };
        // A container is started once.
        drop(container.terminals.set(terminals));
        if let Some(namespace) = namespace {
            drop(container.namespace.set(namespace));
        }
        let mut hosts = hosts.into_iter();
        let pumps = sources.into_iter().map(|(stream, source)| {
            let (id, host) = (container.id.clone(), hosts.next());
            let tee = match stream {
                "stdout" => container.outputs.stdout.clone(),
                _ => container.outputs.stderr.clone(),
            };
            tokio::spawn(async move {
                stdio::pump(&id, stream, source, host, &tee).await;
            })
        });
        let vigil = Vigil {
            exit,
            pumps: pumps.collect(),
        };
        {
            let mut state = container.state();
            state.phase = Phase::Running;
            state.pid = pid;
            state.started_at = started_at;
        }
        let task = tokio::spawn(supervise(self.clone(), container.clone(), vigil));
        let supervisor = container.supervisor.lock();
        *supervisor.unwrap_or_else(PoisonError::into_inner) = Some(task);
        Ok(started_at)
    }
}

/// A stream of the container to its log.
async fn connect(logs: &LogHandle, id: &str, stream: &str) -> Result<Host, Error> {
    let failed = |source| Error::File {
        action: "log",
        path: stream.into(),
        source,
    };
    let host = logs.connect()?;
    host.set_nonblocking(true).map_err(failed)?;
    let mut host = UnixStream::from_std(host).map_err(failed)?;
    let header = format!("{id} {stream}\n");
    host.write_all(header.as_bytes()).await.map_err(failed)?;
    Ok(Box::new(host))
}
