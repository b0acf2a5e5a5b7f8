//! An agent that does as it is scripted: well-formed gRPC of any content, or
//! any bytes at all.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use agent_api::{
    ContainerState, ContainerStats, Event, Exit, GuestStats, ListContainersResponse, StatsResponse,
    container_state, event,
};
use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt};
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// What comes of a call.
#[derive(Clone)]
pub(super) enum Answer {
    /// These messages, each so long after the one before, then success.
    Messages(Vec<(Duration, Bytes)>),
    /// The same message over and over.
    Endless(Bytes),
    /// These bytes in place of messages, then the stream breaks.
    Broken(Bytes),
    /// These bytes, and nothing more for as long as anybody waits.
    Held(Bytes),
    /// Not even a status.
    Mute,
    /// An error of this text.
    Refused(String),
    /// One after another, and then the first again.
    InTurn(Arc<AtomicUsize>, Vec<Answer>),
}

/// Its script as a failed test shows it, without megabytes.
impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |bytes: &Bytes| {
            let first = bytes.slice(..bytes.len().min(16));
            format!("{} bytes {first:?}", bytes.len())
        };
        match self {
            Self::Messages(all) => {
                let all = all.iter().map(|(pause, message)| (pause, bytes(message)));
                write!(f, "Messages({:?})", all.collect::<Vec<_>>())
            }
            Self::Endless(message) => write!(f, "Endless({})", bytes(message)),
            Self::Broken(message) => write!(f, "Broken({})", bytes(message)),
            Self::Held(message) => write!(f, "Held({})", bytes(message)),
            Self::Mute => f.write_str("Mute"),
            Self::Refused(why) => write!(f, "Refused({} characters)", why.chars().count()),
            Self::InTurn(_, all) => write!(f, "InTurn({all:?})"),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) enum Guest {
    /// By method; others are refused.
    Grpc(BTreeMap<&'static str, Answer>),
    /// The first bytes of a connection, then others over and over.
    Raw(Bytes, Bytes),
    /// Every connection is taken and broken off.
    Closes,
}

pub(super) fn message(message: &impl Message) -> Bytes {
    framed(&message.encode_to_vec())
}

/// As gRPC has messages in a stream.
pub(super) fn framed(bytes: &[u8]) -> Bytes {
    let length = u32::try_from(bytes.len()).unwrap();
    [&[0], &length.to_be_bytes()[..], bytes].concat().into()
}

pub(super) fn at_once(message: Bytes) -> Answer {
    Answer::Messages(vec![(Duration::ZERO, message)])
}

pub(super) fn in_turn(answers: impl IntoIterator<Item = Answer>) -> Answer {
    Answer::InTurn(Arc::default(), answers.into_iter().collect())
}

pub(super) fn exit_of(container: &str) -> Bytes {
    message(&Event {
        container_id: container.to_owned(),
        event: Some(event::Event::Exit(Exit {
            code: 7,
            ..Exit::default()
        })),
    })
}

impl Guest {
    /// Of one container, which exits after so long.
    pub(super) fn honest(container: &str, exits_after: Duration) -> Self {
        let state = ContainerState {
            id: container.to_owned(),
            phase: container_state::Phase::Running.into(),
            pid: 7,
            started_at_unix_nanos: 2,
            ..ContainerState::default()
        };
        let list = ListContainersResponse {
            containers: vec![state],
        };
        let stats = StatsResponse {
            containers: vec![ContainerStats {
                id: container.to_owned(),
                ..ContainerStats::default()
            }],
            guest: Some(GuestStats::default()),
            time_unix_nanos: 1,
        };
        let day = Duration::from_secs(24 * 3600);
        let events = vec![(exits_after, exit_of(container)), (day, Bytes::new())];
        Self::Grpc(BTreeMap::from([
            ("ListContainers", at_once(message(&list))),
            ("Stats", at_once(message(&stats))),
            ("Events", Answer::Messages(events)),
            ("RemoveContainer", at_once(framed(&[]))),
        ]))
    }

    /// The same with other answers to some calls.
    pub(super) fn but(self, answers: &[(&'static str, Answer)]) -> Self {
        match self {
            Self::Grpc(mut all) => {
                all.extend(answers.iter().cloned());
                Self::Grpc(all)
            }
            other => other,
        }
    }

    /// Serves in the runtime that is entered, for as long as it lives.
    pub(super) fn listen(self, path: &Path) {
        let listener = UnixListener::bind(path).unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(self.clone().converse(stream));
            }
        });
    }

    async fn converse(self, mut stream: UnixStream) {
        // `CONNECT port`, as the monitor takes it.
        let mut byte = [0];
        while byte != *b"\n" {
            if stream.read_exact(&mut byte).await.is_err() {
                return;
            }
        }
        if stream.write_all(b"OK 1\n").await.is_err() {
            return;
        }
        match self {
            Self::Closes => {}
            Self::Raw(first, again) => flood(stream, first, again).await,
            Self::Grpc(answers) => {
                let answer = |request: Request<Incoming>| {
                    let method = request.uri().path().rsplit('/').next();
                    let answer = method.and_then(|method| answers.get(method)).cloned();
                    answer_with(answer.unwrap_or(Answer::Refused("no".to_owned())))
                };
                let server = http2::Builder::new(TokioExecutor::new());
                // The daemon may break it off.
                let _ = server
                    .serve_connection(TokioIo::new(stream), service_fn(answer))
                    .await;
            }
        }
    }
}

async fn flood(stream: UnixStream, first: Bytes, again: Bytes) {
    let (mut reader, mut writer) = stream.into_split();
    // What the daemon says is taken, so that it is not held up.
    let mut sink = tokio::io::sink();
    let read = tokio::io::copy(&mut reader, &mut sink);
    let write = async {
        let many = again.repeat(65_536 / again.len() + 1);
        let mut sent = writer.write_all(&first).await;
        while sent.is_ok() {
            sent = writer.write_all(&many).await;
        }
    };
    tokio::select! {
        _ = read => {}
        () = write => {}
    }
}

type Body = StreamBody<Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, Broken>> + Send>>>;

#[derive(Debug, thiserror::Error)]
#[error("as scripted")]
struct Broken;

async fn answer_with(mut answer: Answer) -> Result<Response<Body>, Infallible> {
    while let Answer::InTurn(turn, all) = answer {
        let turn = turn.fetch_add(1, Ordering::Relaxed);
        answer = all[turn % all.len()].clone();
    }
    let data = |bytes: Bytes| Ok(Frame::data(bytes));
    let frames: Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, Broken>> + Send>> = match answer {
        Answer::Messages(messages) => {
            let timed = stream::iter(messages).then(move |(pause, bytes)| async move {
                tokio::time::sleep(pause).await;
                data(bytes)
            });
            Box::pin(timed.chain(stream::iter([Ok(status(0, ""))])))
        }
        Answer::Endless(message) => {
            let many = Bytes::from(message.repeat(16_384 / message.len() + 1));
            Box::pin(stream::repeat(many).map(data))
        }
        Answer::Broken(bytes) => Box::pin(stream::iter([data(bytes), Err(Broken)])),
        Answer::Held(bytes) => Box::pin(stream::iter([data(bytes)]).chain(stream::pending())),
        Answer::Mute | Answer::InTurn(..) => std::future::pending().await,
        Answer::Refused(why) => Box::pin(stream::iter([Ok(status(9, &why))])),
    };
    let mut response = Response::new(StreamBody::new(frames));
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

/// The trailers of a call.
fn status(code: u8, message: &str) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    let name = HeaderName::from_static;
    trailers.insert(name("grpc-status"), code.to_string().parse().unwrap());
    let escaped: String = message.bytes().map(|byte| format!("%{byte:02X}")).collect();
    trailers.insert(name("grpc-message"), escaped.parse().unwrap());
    Frame::trailers(trailers)
}
