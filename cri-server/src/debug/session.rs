//! One debug shell from its beginning to the last trace of it, by a task that
//! owns it. Bytes go both ways through queues of a few messages: who does not
//! take them holds up the other side, and nothing piles up here.

use std::time::Instant;

use drupe_api::v1::shell_request::Request as Asked;
use drupe_api::v1::shell_response::Response as Answer;
use drupe_api::v1::{ShellExit, ShellRequest, ShellResponse, ShellStarted};
use drupe_api::{CHUNK_BYTES, QUEUE};
use podsandbox::{PodManager, Session, ShellOptions};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::UCred;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::convert::error;

/// Exit code of a command that SIGKILL ended.
const KILLED: i32 = 128 + 9;
/// What of a command the log tells.
const LOGGED_CHARS: usize = 1024;

const _: () = assert!(QUEUE * CHUNK_BYTES <= 1 << 20, "what waits for one client");

pub struct Client {
    pub requests: Streaming<ShellRequest>,
    pub answers: mpsc::Sender<Result<ShellResponse, Status>>,
}

/// Who is at the other end of the socket, for the log, as far as the kernel
/// tells.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    uid: Option<u32>,
    pid: Option<i32>,
}

impl Caller {
    pub fn of(peer: Option<UCred>) -> Self {
        Self {
            uid: peer.map(|peer| peer.uid()),
            pid: peer.and_then(|peer| peer.pid()),
        }
    }
}

/// How a shell came to its end.
#[derive(Debug)]
enum End {
    Exited(i32),
    /// The client has gone.
    Left,
    /// The guest or the daemon ended it, or the client broke the protocol.
    Broke(Status),
}

/// Runs to its end whatever the client does.
pub async fn serve(
    pods: PodManager,
    options: ShellOptions,
    caller: Caller,
    mut client: Client,
    stopping: CancellationToken,
) {
    let Caller { uid, pid } = caller;
    let asked = options.pod.clone();
    let mut shell = match pods.open_shell(options).await {
        Ok(shell) => shell,
        Err(refused) => {
            let status = error::pod(refused);
            tracing::info!(
                pod = asked,
                uid,
                pid,
                why = status.message(),
                "no debug shell"
            );
            // A client that has gone wants no words.
            let _ = client.answers.send(Err(status)).await;
            return;
        }
    };
    let since = Instant::now();
    let (pod, image) = (shell.pod.clone(), shell.image.clone());
    let name = format!("{}/{}", shell.name.namespace, shell.name.name);
    let command: String = shell.command.join(" ").chars().take(LOGGED_CHARS).collect();
    tracing::info!(pod, name, image, ?command, uid, pid, "debug shell begins");

    let end = {
        let gone = client.answers.clone();
        let begun = async {
            tell(
                &client.answers,
                Answer::Started(ShellStarted {
                    image: image.clone(),
                }),
            )
            .await?;
            follow(&mut shell.session, &mut client).await
        };
        tokio::select! {
            () = gone.closed() => End::Left,
            () = stopping.cancelled() => {
                End::Broke(Status::unavailable("the daemon is stopping; pods run on"))
            }
            end = begun => end.unwrap_or_else(|end| end),
        }
    };
    let end = explained(end, &pods, &pod);
    // Whoever hears of its end finds it gone.
    pods.close_shell(shell).await;
    let seconds = since.elapsed().as_secs_f32();
    tracing::info!(
        pod,
        name,
        image,
        ?command,
        uid,
        pid,
        seconds,
        ?end,
        "debug shell ended"
    );
    let last = match end {
        End::Exited(code) => Ok(answer(Answer::Exit(ShellExit { code }))),
        End::Broke(status) => Err(status),
        End::Left => return,
    };
    // As above.
    let _ = client.answers.send(last).await;
}

/// A pod that is stopped has all that runs in it killed: that is no exit of the
/// command's own.
fn explained(end: End, pods: &PodManager, pod: &str) -> End {
    let is_ready = || pods.pod(pod).is_ok_and(|pod| pod.is_ready());
    match end {
        End::Exited(KILLED) if !is_ready() => {
            End::Broke(Status::unavailable("the pod was stopped"))
        }
        end => end,
    }
}

fn answer(response: Answer) -> ShellResponse {
    ShellResponse {
        response: Some(response),
    }
}

async fn tell(
    answers: &mpsc::Sender<Result<ShellResponse, Status>>,
    response: Answer,
) -> Result<(), End> {
    let sent = answers.send(Ok(answer(response))).await;
    sent.map_err(|_| End::Left)
}

/// Moves bytes until the command has ended and its output was taken.
async fn follow(session: &mut Session, client: &mut Client) -> Result<End, End> {
    let stdout = output(session.stdout.take(), &client.answers, Answer::Stdout);
    let stderr = output(session.stderr.take(), &client.answers, Answer::Stderr);
    let exit = &mut session.exit;
    let ended = async {
        tokio::try_join!(stdout, stderr)?;
        let code = exit.await;
        code.map(End::Exited)
            .map_err(|why| End::Broke(Status::unavailable(why)))
    };
    let resize = session.resize.take();
    let fed = input(&mut client.requests, session.stdin.take(), resize);
    tokio::select! {
        biased;
        ended = ended => ended,
        broken = fed => Err(End::Broke(broken)),
    }
}

async fn output(
    stream: Option<impl AsyncRead + Unpin>,
    answers: &mpsc::Sender<Result<ShellResponse, Status>>,
    wrap: fn(Vec<u8>) -> Answer,
) -> Result<(), End> {
    let Some(mut stream) = stream else {
        return Ok(());
    };
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match stream.read(&mut buffer).await {
            // A guest that has gone says why by the exit.
            Ok(0) | Err(_) => return Ok(()),
            Ok(length) => tell(answers, wrap(buffer[..length].to_vec())).await?,
        }
    }
}

/// Ends for a client that breaks the protocol, and else never.
async fn input(
    requests: &mut Streaming<ShellRequest>,
    mut stdin: Option<impl AsyncWrite + Unpin>,
    resize: Option<mpsc::Sender<(u16, u16)>>,
) -> Status {
    // An end with an error is that of a client that has gone, which is noticed
    // elsewhere.
    while let Ok(Some(request)) = requests.message().await {
        match request.request {
            Some(Asked::Input(bytes)) => {
                if let Some(to) = &mut stdin
                    && to.write_all(&bytes).await.is_err()
                {
                    // The command takes no more; what still comes is for nobody.
                    stdin = None;
                }
            }
            Some(Asked::Size(size)) => {
                if let Some(resize) = &resize {
                    // Its receiver goes with the session.
                    let _ = resize.send(super::size(size)).await;
                }
            }
            Some(Asked::Begin(_)) => {
                return Status::invalid_argument("`begin` came a second time");
            }
            // Of a later version.
            None => {}
        }
    }
    if let Some(mut stdin) = stdin {
        // One that the command has closed has ended, too.
        let _ = stdin.shutdown().await;
        drop(stdin);
    }
    std::future::pending().await
}
