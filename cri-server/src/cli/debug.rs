//! `drupe debug POD`: a root shell in a pod's guest. The daemon makes it and
//! decides whether; this moves bytes.

use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::thread;

use clap::builder::NonEmptyStringValueParser;
use drupe_api::v1::debug_client::DebugClient;
use drupe_api::v1::shell_request::Request as Asked;
use drupe_api::v1::shell_response::Response as Answer;
use drupe_api::v1::{ShellBegin, ShellRequest, ShellResponse, ShellStarted, TerminalSize};
use drupe_api::{CHUNK_BYTES, MAX_MESSAGE_BYTES, QUEUE};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::terminal::{self, Raw};
use super::{CliError, Daemon, choose, full_name, runtime};

/// Exit code of a command that the guest gives a number that is none.
const NO_CODE: u8 = 255;
/// What a shell adds to the signal that ended a command.
const SIGNALLED: u8 = 128;

#[derive(clap::Args)]
pub struct Options {
    /// Where programs come from: an image that is on the node. Without it, that
    /// of the pod's container that has run longest.
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    image: Option<String>,
    /// The beginning of its id, or namespace/name.
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pod: String,
    /// What to run instead of /bin/sh.
    #[arg(last = true)]
    command: Vec<String>,
}

/// The command's exit code.
pub fn run(socket: &Path, options: &Options) -> Result<u8, CliError> {
    let runtime = runtime()?;
    let outcome = runtime.block_on(shell(socket, options));
    // An output that nobody takes would be waited for.
    runtime.shutdown_background();
    outcome
}

async fn shell(socket: &Path, options: &Options) -> Result<u8, CliError> {
    let mut daemon = Daemon::connect(socket).await?;
    let pod = choose(daemon.list().await?, &options.pod)?;
    let stdin = io::stdin();
    let has_terminal = stdin.is_terminal() && io::stdout().is_terminal();
    let begin = ShellBegin {
        pod_id: pod.id.clone(),
        image: options.image.clone().unwrap_or_default(),
        command: options.command.clone(),
        terminal: has_terminal.then(terminal_size).transpose()?,
    };
    let (requests, queue) = mpsc::channel(QUEUE);
    // The queue is empty and its receiver here.
    let _ = requests.send(request(Asked::Begin(begin))).await;
    let mut client = DebugClient::new(daemon.channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let answered = client.shell(ReceiverStream::new(queue)).await;
    let mut answers = answered.map_err(refused)?.into_inner();
    let started = match next(&mut answers).await.map_err(refused)? {
        Answer::Started(started) => started,
        _ => return Err(refused(broken())),
    };
    let Some(mut watch) = has_terminal.then(Watch::new).transpose()? else {
        read_input(requests);
        return relay(&mut answers).await;
    };
    greet(&full_name(&pod), &started);
    let _raw = Raw::enter().map_err(CliError::Terminal)?;
    tokio::spawn(keep_size(watch.resized, requests.clone()));
    read_input(requests);
    tokio::select! {
        code = relay(&mut answers) => code,
        signal = watch.ends.next() => Ok(SIGNALLED + signal),
    }
}

fn greet(pod: &str, started: &ShellStarted) {
    eprintln!(
        "root of the guest of pod {pod}; programs of image {}, the guest's files in /guest",
        started.image
    );
}

fn request(request: Asked) -> ShellRequest {
    ShellRequest {
        request: Some(request),
    }
}

fn refused(status: Status) -> CliError {
    match status.code() {
        Code::Unimplemented => CliError::OldDaemon,
        _ => CliError::Refused { status },
    }
}

fn broke_off(status: Status) -> CliError {
    // One that was made on this side has the transport's error as source.
    let why = match std::error::Error::source(&status) {
        Some(_) => "the daemon has gone; pods run on",
        None => status.message(),
    };
    CliError::BrokeOff {
        why: why.to_owned(),
    }
}

fn broken() -> Status {
    Status::internal("the daemon's answer is not one of this version; restart the daemon")
}

async fn next(answers: &mut Streaming<ShellResponse>) -> Result<Answer, Status> {
    let answer = answers.message().await?;
    answer.and_then(|answer| answer.response).ok_or_else(broken)
}

/// Writes what comes until the command has ended.
async fn relay(answers: &mut Streaming<ShellResponse>) -> Result<u8, CliError> {
    loop {
        let answer = next(answers).await;
        match answer.map_err(broke_off)? {
            Answer::Stdout(bytes) => write(io::stdout(), bytes).await?,
            Answer::Stderr(bytes) => write(io::stderr(), bytes).await?,
            Answer::Exit(exit) => return Ok(u8::try_from(exit.code).unwrap_or(NO_CODE)),
            Answer::Started(_) => return Err(refused(broken())),
        }
    }
}

/// Not on this thread, which hears of signals while nobody takes the output.
async fn write(mut to: impl Write + Send + 'static, bytes: Vec<u8>) -> Result<(), CliError> {
    let written = tokio::task::spawn_blocking(move || {
        to.write_all(&bytes)?;
        to.flush()
    });
    let written = written
        .await
        .map_err(|error| CliError::Output(error.into()))?;
    written.map_err(CliError::Output)
}

/// By a thread of its own, which ends with the program: nothing can end a read
/// of a terminal. The end of the input is that of the requests.
fn read_input(requests: mpsc::Sender<ShellRequest>) {
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let length = match io::stdin().lock().read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // What cannot be read has ended.
                Ok(0) | Err(_) => return,
                Ok(length) => length,
            };
            let input = request(Asked::Input(buffer[..length].to_vec()));
            if requests.blocking_send(input).is_err() {
                return;
            }
        }
    });
}

fn terminal_size() -> Result<TerminalSize, CliError> {
    let (width, height) = terminal::size(&io::stdin()).map_err(CliError::Terminal)?;
    Ok(TerminalSize {
        width: width.into(),
        height: height.into(),
    })
}

async fn keep_size(mut resized: Signal, requests: mpsc::Sender<ShellRequest>) {
    while resized.recv().await.is_some() {
        // A terminal that has gone has no size.
        let Ok(size) = terminal_size() else { return };
        if requests.send(request(Asked::Size(size))).await.is_err() {
            return;
        }
    }
}

/// What is told by signals while the terminal is not in its usual state.
struct Watch {
    resized: Signal,
    ends: Ends,
}

/// Those that end this program, with their numbers.
struct Ends {
    hangup: Signal,
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
}

impl Watch {
    fn new() -> Result<Self, CliError> {
        let on = |kind| signal(kind).map_err(CliError::Terminal);
        Ok(Self {
            resized: on(SignalKind::window_change())?,
            ends: Ends {
                hangup: on(SignalKind::hangup())?,
                interrupt: on(SignalKind::interrupt())?,
                quit: on(SignalKind::quit())?,
                terminate: on(SignalKind::terminate())?,
            },
        })
    }
}

impl Ends {
    async fn next(&mut self) -> u8 {
        let kind = tokio::select! {
            _ = self.hangup.recv() => SignalKind::hangup(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.quit.recv() => SignalKind::quit(),
            _ = self.terminate.recv() => SignalKind::terminate(),
        };
        u8::try_from(kind.as_raw_value()).unwrap_or_default()
    }
}
