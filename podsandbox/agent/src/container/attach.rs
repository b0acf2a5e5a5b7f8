//! Attach: a client at the streams of a running container.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use agent_api::{AttachRequest, Streams};
use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::session::{Client, Connections, Events, Host, SessionError, end};
use super::stdin::{EndedBy, Stdin};
use super::tee::{Tap, TooSlow};
use super::{Container, Containers, Error, Outputs};

/// Clients in the whole guest at once. Each may have half a MiB of output
/// waiting for it.
pub const MAX_ATTACHED: usize = 64;

impl Containers {
    /// The session ends with the container, or with the client's standard
    /// input unless that is the container's only one (stdin_once).
    pub fn attach(&self, request: AttachRequest) -> Result<Events<Error>, Error> {
        let container = self.get(&request.container_id)?;
        container.check_running()?;
        let permit = self.inner.attached.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Error::TooManyAttached)?;
        let (client, events) = self.inner.sessions.begin()?;
        let asked = request.streams.unwrap_or_default();
        let too_slow = Error::TooSlow {
            id: container.id.clone(),
        };
        tokio::spawn(serve(container.target(), asked, client, too_slow, permit));
        Ok(events)
    }
}

impl Container {
    fn target(self: &Arc<Self>) -> Target {
        let container = self.clone();
        let code = move || container.state().exit.as_ref().map_or(0, |exit| exit.code);
        Target {
            stdin: self.stdin.clone(),
            terminal: self.terminal.clone(),
            outputs: self.outputs.clone(),
            published: self.published.subscribe(),
            code: Box::new(code),
        }
    }
}

/// What clients of a container are attached to.
pub struct Target {
    pub stdin: Option<Arc<Stdin>>,
    /// The master of its terminal.
    pub terminal: Option<Arc<OwnedFd>>,
    pub outputs: Outputs,
    /// True once its exit was published.
    pub published: watch::Receiver<bool>,
    /// Its exit code by then.
    pub code: Box<dyn Fn() -> i32 + Send + Sync>,
}

/// Connects a client's streams and follows them to their end.
pub async fn serve<E: From<SessionError>>(
    target: Target,
    asked: Streams,
    mut client: Client<E>,
    too_slow: E,
    _permit: OwnedSemaphorePermit,
) {
    let terminal = target.terminal.is_some();
    let streams = Streams {
        stdin: asked.stdin && target.stdin.is_some(),
        stderr: asked.stderr && !terminal,
        ..asked
    };
    let Some(connections) = client.connect(streams, terminal).await else {
        return;
    };
    client.has_terminal(target.terminal.clone());
    let attached = Attached::begin(target, connections);
    client.started().await;
    attached.follow(client, too_slow).await;
}

/// A client whose streams are connected.
struct Attached {
    target: Target,
    input: Option<(Arc<Stdin>, JoinHandle<EndedBy>)>,
    outputs: JoinSet<Result<(), TooSlow>>,
    /// Turned true when nothing more is to be taken from the container.
    detach: watch::Sender<bool>,
}

impl Attached {
    fn begin(target: Target, connections: Connections) -> Self {
        let detach = watch::Sender::new(false);
        let mut outputs = JoinSet::new();
        let taps = [
            (connections.stdout, &target.outputs.stdout),
            (connections.stderr, &target.outputs.stderr),
        ];
        for (connection, tee) in taps {
            if let Some(connection) = connection {
                outputs.spawn(deliver(tee.tap(), connection, detach.subscribe()));
            }
        }
        let input = connections.stdin.zip(target.stdin.clone());
        let input = input.map(|(connection, stdin)| {
            let to = stdin.clone();
            (
                stdin,
                tokio::spawn(async move { to.feed(connection).await }),
            )
        });
        Self {
            target,
            input,
            outputs,
            detach,
        }
    }

    async fn follow<E: From<SessionError>>(mut self, client: Client<E>, too_slow: E) {
        let outcome = tokio::select! {
            () = client.gone() => None,
            outcome = self.outcome() => Some(outcome),
        };
        self.outputs.shutdown().await;
        if let Some((stdin, feeder)) = self.input.take() {
            feeder.abort();
            if stdin.once {
                stdin.close().await;
            }
        }
        match outcome {
            None => {}
            Some(Ok(Outcome::Exited(code))) => client.ended(code, false).await,
            Some(Ok(Outcome::Detached)) => client.ended(0, true).await,
            Some(Err(TooSlow)) => client.fail(too_slow).await,
        }
    }

    async fn outcome(&mut self) -> Result<Outcome, TooSlow> {
        let mut published = self.target.published.clone();
        let mut detached = false;
        loop {
            tokio::select! {
                // All that was given goes out before the end is told.
                Some(delivered) = self.outputs.join_next() => {
                    // A task is aborted only after this.
                    delivered.unwrap_or(Ok(()))?;
                }
                ended_by = fed(&mut self.input), if !detached => {
                    let Some((stdin, _)) = self.input.take() else { continue };
                    if stdin.once {
                        stdin.close().await;
                    } else if ended_by == EndedBy::Client {
                        self.detach.send_replace(true);
                        detached = true;
                    }
                }
                () = seen(&mut published), if !detached && self.outputs.is_empty() => {
                    return Ok(Outcome::Exited((self.target.code)()));
                }
                else => return Ok(Outcome::Detached),
            }
        }
    }
}

enum Outcome {
    Exited(i32),
    Detached,
}

/// Waits until it is true; a sender that has gone means the same.
async fn seen(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|flag| *flag).await;
}

/// Which side ended the standard input; never without one.
async fn fed(input: &mut Option<(Arc<Stdin>, JoinHandle<EndedBy>)>) -> EndedBy {
    match input {
        // A task that panicked moves nothing more either.
        Some((_, feeder)) => feeder.await.unwrap_or(EndedBy::Process),
        None => std::future::pending().await,
    }
}

/// Moves output to the client until its end. A client that takes no more of
/// this stream may still want the others.
async fn deliver(
    mut tap: Tap,
    mut client: Host,
    mut detach: watch::Receiver<bool>,
) -> Result<(), TooSlow> {
    let mut detached = false;
    loop {
        let chunk = tokio::select! {
            biased;
            () = seen(&mut detach), if !detached => {
                tap.close();
                detached = true;
                continue;
            }
            chunk = tap.next() => chunk?,
        };
        let Some(chunk) = chunk else {
            end(Some(client)).await;
            return Ok(());
        };
        tokio::select! {
            written = client.write_all(&chunk) => if written.is_err() {
                return Ok(());
            },
            () = tap.dropped() => return Err(TooSlow),
        }
    }
}
