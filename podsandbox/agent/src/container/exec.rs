//! Commands in a running container: ExecSync, its output in the answer, and
//! Exec, with streams of its own.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use agent_api::{
    ExecExit, ExecRequest, ExecSyncEvent, ExecSyncRequest, Streams, exec_sync_event::Event,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::command::Wish;
use super::session::{Client, Connections, Events, SessionError, deliver};
use super::stdin::Stdin;
use super::stdio::{CHUNK, Source, StdioError};
use super::{Containers, Error};
use crate::log;
use crate::reaper::ExitCode;

/// Chunks of output that wait for the host before the command's writes do.
const QUEUE: usize = 4;

/// How long the host may take no output of an ExecSync that has ended.
const HOST_STALL: Duration = Duration::from_secs(30);

pub type Output = mpsc::Receiver<ExecSyncEvent>;

/// A command that runs.
pub trait Running: Send + Sized + 'static {
    /// Asked for once.
    fn take_ends(&mut self) -> Ends;

    /// Waits for its exit, or kills it and all it has started when `stop`
    /// comes first.
    fn exited(
        &mut self,
        stop: impl Future<Output = ()> + Send,
    ) -> impl Future<Output = ExitCode> + Send;

    /// Gives back what it held.
    fn clear(self) -> impl Future<Output = ()> + Send;
}

/// This side's ends of a command's streams.
#[derive(Default)]
pub struct Ends {
    pub stdin: Option<OwnedFd>,
    pub outputs: Vec<(&'static str, Source)>,
    /// The master of its terminal.
    pub terminal: Option<Arc<OwnedFd>>,
}

impl Containers {
    /// Starts the command; fails if it cannot be run. The command is killed
    /// when the receiver is dropped before its last event.
    pub async fn exec_sync(&self, request: ExecSyncRequest) -> Result<Output, Error> {
        let container = self.get(&request.container_id)?;
        let permit = self.exec_permit()?;
        let containers = self.clone();
        // Spawned so that a caller who gives up leaves nothing half made.
        tokio::spawn(async move {
            let wish = Wish {
                argv: &request.argv,
                terminal: false,
                size: (0, 0),
                stdin: false,
            };
            let command = containers.command(container, wish, permit).await?;
            Ok(answer(command, request.timeout_millis))
        })
        .await?
    }

    /// Makes a command ready that starts once its streams are connected. It is
    /// killed when the receiver is dropped before its last event.
    pub fn exec(&self, request: ExecRequest) -> Result<Events<Error>, Error> {
        let container = self.get(&request.container_id)?;
        container.check_takes_commands()?;
        let permit = self.exec_permit()?;
        let (client, events) = self.inner.sessions.begin()?;
        let containers = self.clone();
        let (streams, terminal) = (request.streams.unwrap_or_default(), request.terminal);
        let cut = |size| u16::try_from(size).unwrap_or(u16::MAX);
        let size = (cut(request.height), cut(request.width));
        let begin = async move |streams: Streams| {
            let wish = Wish {
                argv: &request.argv,
                terminal,
                size,
                stdin: streams.stdin,
            };
            containers.command(container, wish, permit).await
        };
        tokio::spawn(serve(begin, streams, terminal, client));
        Ok(events)
    }
}

/// Connects a session's streams, begins its command and follows it to its end.
pub async fn serve<R, E, B>(
    begin: impl FnOnce(Streams) -> B,
    asked: Streams,
    terminal: bool,
    mut client: Client<E>,
) where
    R: Running,
    E: From<SessionError> + From<StdioError> + Send,
    B: Future<Output = Result<R, E>>,
{
    let streams = Streams {
        stderr: asked.stderr && !terminal,
        ..asked
    };
    let Some(connections) = client.connect(streams, terminal).await else {
        return;
    };
    let mut command = match begin(streams).await {
        Ok(command) => command,
        Err(error) => return client.fail(error).await,
    };
    let mut ends = command.take_ends();
    client.has_terminal(ends.terminal.take());
    let tasks = match connect(ends, connections, terminal) {
        Ok(tasks) => tasks,
        Err(error) => {
            command.exited(async {}).await;
            command.clear().await;
            return client.fail(error.into()).await;
        }
    };
    client.started().await;
    let code = command.exited(client.gone()).await;
    for mut output in tasks.outputs {
        // However slow the client is, it gets the last byte.
        let joined = tokio::select! {
            biased;
            joined = &mut output => joined,
            () = client.gone() => {
                output.abort();
                output.await
            }
        };
        report(joined);
    }
    if let Some(stdin) = tasks.stdin {
        stdin.abort();
        report(stdin.await);
    }
    command.clear().await;
    client.ended(code.0, false).await;
}

struct Tasks {
    stdin: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
}

/// Joins the command's streams to its client's.
fn connect(
    mut ends: Ends,
    mut connections: Connections,
    terminal: bool,
) -> Result<Tasks, StdioError> {
    let stdin = match (ends.stdin.take(), connections.stdin.take()) {
        (Some(ours), Some(client)) => {
            let stdin = Stdin::new(ours, !terminal).map_err(StdioError::Create)?;
            Some(tokio::spawn(async move {
                stdin.feed(client).await;
                if stdin.once {
                    stdin.close().await;
                }
            }))
        }
        _ => None,
    };
    let outputs = ends.outputs.into_iter().map(|(stream, source)| {
        let client = match stream {
            "stdout" => connections.stdout.take(),
            _ => connections.stderr.take(),
        };
        tokio::spawn(deliver(source, client))
    });
    Ok(Tasks {
        stdin,
        outputs: outputs.collect(),
    })
}

fn report(joined: Result<(), tokio::task::JoinError>) {
    if let Err(error) = joined
        && !error.is_cancelled()
    {
        log::warn(format_args!("a stream of a command: {error}"));
    }
}

/// Follows an ExecSync to its end; no time limit is 0.
pub fn answer(command: impl Running, limit_millis: u64) -> Output {
    let (events, output) = mpsc::channel(QUEUE);
    let limit = (limit_millis > 0).then(|| Duration::from_millis(limit_millis));
    tokio::spawn(follow(command, events, limit));
    output
}

async fn follow(
    mut command: impl Running,
    events: mpsc::Sender<ExecSyncEvent>,
    limit: Option<Duration>,
) {
    let outputs = command.take_ends().outputs.into_iter();
    let pumps: Vec<_> = outputs
        .map(|(stream, source)| {
            let wrap = if stream == "stdout" {
                Event::Stdout
            } else {
                Event::Stderr
            };
            tokio::spawn(pump(source, wrap, events.clone()))
        })
        .collect();
    let mut timed_out = false;
    let stop = async {
        tokio::select! {
            () = async {
                match limit {
                    Some(limit) => sleep(limit).await,
                    None => std::future::pending().await,
                }
            } => timed_out = true,
            () = events.closed() => {}
        }
    };
    let code = command.exited(stop).await;
    for pump in pumps {
        report(pump.await);
    }
    let exit = Event::Exit(ExecExit {
        code: code.0,
        timed_out,
    });
    // A caller who has gone wants no exit either.
    let _ = events
        .send_timeout(ExecSyncEvent { event: Some(exit) }, HOST_STALL)
        .await;
    command.clear().await;
}

/// Moves output to the host until its end, or until nobody takes it.
async fn pump(mut source: Source, wrap: fn(Vec<u8>) -> Event, events: mpsc::Sender<ExecSyncEvent>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = match source.read(&mut buffer).await {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) => {
                log::warn(format_args!("cannot read the output of a command: {error}"));
                return;
            }
        };
        let event = ExecSyncEvent {
            event: Some(wrap(buffer[..length].to_vec())),
        };
        let sent = if source.has_ended() {
            events.send_timeout(event, HOST_STALL).await.is_ok()
        } else {
            events.send(event).await.is_ok()
        };
        if !sent {
            return;
        }
    }
}
