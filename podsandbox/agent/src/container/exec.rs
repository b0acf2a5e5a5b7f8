//! Commands in a running container: ExecSync, its output in the answer, and
//! Exec, with streams of its own.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{
    ExecExit, ExecRequest, ExecSyncEvent, ExecSyncRequest, Streams, exec_sync_event::Event,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::command::{Command, Wish};
use super::session::{Client, Connections, Events, deliver};
use super::stdin::Stdin;
use super::stdio::{CHUNK, Source, StdioError};
use super::{Container, Containers, Error};

/// Chunks of output that wait for the host before the command's writes do.
const QUEUE: usize = 4;

/// How long the host may take no output of an ExecSync that has ended.
const HOST_STALL: Duration = Duration::from_secs(30);

pub type Output = mpsc::Receiver<ExecSyncEvent>;

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
                stdin: false,
            };
            let command = containers.command(container, wish, permit).await?;
            let (events, output) = mpsc::channel(QUEUE);
            let limit = request.timeout_millis;
            let limit = (limit > 0).then(|| Duration::from_millis(limit));
            tokio::spawn(answer(command, events, limit));
            Ok(output)
        })
        .await?
    }

    /// Makes a command ready that starts once its streams are connected. It is
    /// killed when the receiver is dropped before its last event.
    pub fn exec(&self, request: ExecRequest) -> Result<Events, Error> {
        let container = self.get(&request.container_id)?;
        container.check_running()?;
        let permit = self.exec_permit()?;
        let (client, events) = self.inner.sessions.begin()?;
        tokio::spawn(serve(self.clone(), container, request, client, permit));
        Ok(events)
    }
}

async fn serve(
    containers: Containers,
    container: Arc<Container>,
    request: ExecRequest,
    mut client: Client,
    permit: OwnedSemaphorePermit,
) {
    let asked = request.streams.unwrap_or_default();
    let streams = Streams {
        stderr: asked.stderr && !request.terminal,
        ..asked
    };
    let Some(connections) = client.connect(streams, request.terminal).await else {
        return;
    };
    let wish = Wish {
        argv: &request.argv,
        terminal: request.terminal,
        stdin: streams.stdin,
    };
    let mut command = match containers.command(container, wish, permit).await {
        Ok(command) => command,
        Err(error) => return client.fail(error).await,
    };
    client.has_terminal(command.terminal.take());
    let tasks = match connect(&mut command, connections, request.terminal) {
        Ok(tasks) => tasks,
        Err(error) => {
            command.exited(async {}).await;
            command.clear();
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
    command.clear();
    client.ended(code.0, false).await;
}

struct Tasks {
    stdin: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
}

/// Joins the command's streams to its client's.
fn connect(
    command: &mut Command,
    mut connections: Connections,
    terminal: bool,
) -> Result<Tasks, StdioError> {
    let stdin = match (command.stdin.take(), connections.stdin.take()) {
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
    let outputs = std::mem::take(&mut command.outputs).into_iter();
    let outputs = outputs.map(|(stream, source)| {
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
        eprintln!("drupe-agent: a stream of a command: {error}");
    }
}

/// Follows an ExecSync to its end.
async fn answer(
    mut command: Command,
    events: mpsc::Sender<ExecSyncEvent>,
    limit: Option<Duration>,
) {
    let outputs = std::mem::take(&mut command.outputs).into_iter();
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
    command.clear();
}

/// Moves output to the host until its end, or until nobody takes it.
async fn pump(mut source: Source, wrap: fn(Vec<u8>) -> Event, events: mpsc::Sender<ExecSyncEvent>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = match source.read(&mut buffer).await {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) => {
                eprintln!("drupe-agent: cannot read the output of a command: {error}");
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
