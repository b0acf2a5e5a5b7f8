//! Exec and attach with streams, and forwarded ports: what the streaming
//! server reads from and writes to.
//!
//! Control goes by gRPC, bytes by one vsock connection a stream (see
//! [`agent_api::stream`]): a reader that does not read fills its connection,
//! and the process in the guest waits. The call to the agent lasts as long as
//! the session, so dropping a [`Session`] is how the guest learns that the
//! client has gone: a command is killed, a container is left alone.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use agent_api::session_event::Event;
use agent_api::stream::{Hello, Stream, Token};
use agent_api::{AttachRequest, ExecRequest, ResizeRequest, SessionEnded, SessionEvent, Streams};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Streaming;

use crate::agent::{AgentClient, refused};
use crate::{Error, Result};

/// From asking for a session to its command running, and from asking for a
/// port to an answer; milliseconds unless the guest is overloaded.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// Sizes of a terminal that wait to be set; of those only the last matters.
const SIZES: usize = 4;

/// What a command is asked to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOptions {
    /// Id or unambiguous prefix.
    pub container_id: String,
    pub argv: Vec<String>,
    /// With a terminal standard error is part of standard output.
    pub tty: bool,
    /// Width and height of the terminal from its first moment on, where they
    /// are known by then.
    pub size: Option<(u16, u16)>,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// Which of a container's streams a client wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttachOptions {
    /// Id or unambiguous prefix.
    pub container_id: String,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// One command that runs, or one client of a container. Dropping it, or its
/// `exit`, says that the client has gone.
pub struct Session {
    /// `shutdown` is the end of standard input; a broken pipe says that the
    /// process takes no more.
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    pub stdout: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// None with a terminal.
    pub stderr: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Width and height in characters; none without a terminal.
    pub resize: Option<mpsc::Sender<(u16, u16)>>,
    /// The exit code, as a shell gives it; 0 for a client that was detached
    /// because its standard input ended. Resolves after the output streams
    /// were read to their end, or dropped.
    pub exit: Pin<Box<dyn Future<Output = std::result::Result<i32, String>> + Send>>,
}

impl AgentClient {
    /// Runs a command in a container, whose id is full, with streams of its
    /// own. Returns once it runs; one that cannot be run is an error.
    pub async fn exec(&self, options: ExecOptions) -> Result<Session> {
        let (width, height) = options.size.unwrap_or_default();
        let request = ExecRequest {
            width: width.into(),
            height: height.into(),
            container_id: options.container_id,
            argv: options.argv,
            terminal: options.tty,
            streams: Some(Streams {
                stdin: options.stdin,
                stdout: options.stdout,
                stderr: options.stderr && !options.tty,
            }),
        };
        within("Exec", async {
            let events = self.begin_exec(request).await?;
            open(self, "Exec", events).await
        })
        .await
    }

    /// Joins the streams of a container, whose id is full: its output from now
    /// on.
    pub async fn attach(&self, options: AttachOptions) -> Result<Session> {
        let request = AttachRequest {
            container_id: options.container_id,
            streams: Some(Streams {
                stdin: options.stdin,
                stdout: options.stdout,
                stderr: options.stderr,
            }),
        };
        within("Attach", async {
            let events = self.begin_attach(request).await?;
            open(self, "Attach", events).await
        })
        .await
    }

    /// A connection to `port` on the guest's loopback; `pod` names it in
    /// errors.
    pub async fn port_forward(&self, pod: &str, port: u16) -> Result<UnixStream> {
        let failed = |why: String| Error::Forward {
            pod: pod.to_owned(),
            port,
            why,
        };
        if port == 0 {
            return Err(failed("there is no port 0".to_owned()));
        }
        let hello = Hello::Forward { port };
        within("PortForward", self.stream(hello, failed)).await
    }
}

async fn within<T>(call: &'static str, work: impl Future<Output = Result<T>>) -> Result<T> {
    match timeout(OPEN_TIMEOUT, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::AgentTimeout {
            call,
            seconds: OPEN_TIMEOUT.as_secs(),
        }),
    }
}

/// Connects the streams of a session and waits until it runs.
async fn open(
    agent: &AgentClient,
    call: &'static str,
    mut events: Streaming<SessionEvent>,
) -> Result<Session> {
    let broken = |why| Error::Protocol { call, why };
    let Event::Opened(opened) = next(agent, call, &mut events).await? else {
        return Err(broken("it did not open the session"));
    };
    let token: Token = opened
        .token
        .try_into()
        .map_err(|_| broken("a session's token has not 16 bytes"))?;
    let streams = opened.streams.unwrap_or_default();
    let connect = |wanted: bool, stream| async move {
        match wanted {
            true => {
                let hello = Hello::Session { token, stream };
                let refused = |message| Error::AgentLink { call, message };
                agent.stream(hello, refused).await.map(Some)
            }
            false => Ok(None),
        }
    };
    let (stdin, stdout, stderr) = tokio::try_join!(
        connect(streams.stdin, Stream::Stdin),
        connect(streams.stdout, Stream::Stdout),
        connect(streams.stderr, Stream::Stderr),
    )?;
    let Event::Started(_) = next(agent, call, &mut events).await? else {
        return Err(broken("it did not start the session"));
    };

    let (open, mut read) = mpsc::channel(1);
    let output = |stream: UnixStream| {
        let open = Some(open.clone());
        Box::new(Output { stream, open }) as Box<dyn AsyncRead + Send + Unpin>
    };
    let (stdout, stderr) = (stdout.map(output), stderr.map(output));
    drop(open);
    let (sizes, resize) = mpsc::channel(SIZES);
    if opened.terminal {
        tokio::spawn(agent.in_scope(keep_size(agent.clone(), token, resize)));
    }
    let agent = agent.clone();
    Ok(Session {
        stdin: stdin.map(|stream| Box::new(stream) as Box<dyn AsyncWrite + Send + Unpin>),
        stdout,
        stderr,
        resize: opened.terminal.then_some(sizes),
        exit: Box::pin(async move {
            let code = exit_code(&agent, call, &mut events).await;
            // Nothing is ever sent: it ends with the last reader.
            let None: Option<Never> = read.recv().await;
            code
        }),
    })
}

/// Nothing is of this type.
enum Never {}

async fn exit_code(
    agent: &AgentClient,
    call: &'static str,
    events: &mut Streaming<SessionEvent>,
) -> std::result::Result<i32, String> {
    match next(agent, call, events).await {
        Ok(Event::Ended(SessionEnded { code, .. })) => Ok(code),
        Ok(_) => Err(format!("the agent broke the protocol of {call}")),
        Err(error) => Err(error.sentence()),
    }
}

async fn next(
    agent: &AgentClient,
    call: &'static str,
    events: &mut Streaming<SessionEvent>,
) -> Result<Event> {
    let message = tokio::select! {
        () = agent.stopped() => return Err(Error::Stopping),
        message = agent.in_scope(events.message()) => message,
    };
    let event = message.map_err(|status| refused(call, &status))?;
    event.and_then(|event| event.event).ok_or(Error::Protocol {
        call,
        why: "it ended without a word",
    })
}

/// Passes sizes on, the latest of those that wait, until nobody sends any.
async fn keep_size(agent: AgentClient, token: Token, mut sizes: mpsc::Receiver<(u16, u16)>) {
    while let Some(mut size) = sizes.recv().await {
        while let Ok(later) = sizes.try_recv() {
            size = later;
        }
        let request = ResizeRequest {
            token: token.to_vec(),
            width: size.0.into(),
            height: size.1.into(),
        };
        if let Err(error) = agent.resize(request).await {
            // As a rule the session has ended.
            tracing::debug!(error = %error.sentence(), "a terminal keeps its size");
            return;
        }
    }
}

/// An output stream that tells when it was read to its end.
struct Output {
    stream: UnixStream,
    open: Option<mpsc::Sender<Never>>,
}

impl AsyncRead for Output {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        let ended = match &polled {
            Poll::Ready(Ok(())) => buffer.filled().len() == before && buffer.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if ended {
            self.open = None;
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn an_output_is_over_once_it_was_read_to_its_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (open, mut read) = mpsc::channel::<Never>(1);
        let mut output = Output {
            stream: ours,
            open: Some(open),
        };
        theirs.write_all(b"all").await.unwrap();
        drop(theirs);
        let mut three = [0; 3];
        output.read_exact(&mut three).await.unwrap();
        assert!(matches!(
            read.try_recv(),
            Err(mpsc::error::TryRecvError::Empty)
        ));
        assert_eq!(output.read(&mut three).await.unwrap(), 0);
        assert!(matches!(
            read.try_recv(),
            Err(mpsc::error::TryRecvError::Disconnected)
        ));
    }
}
