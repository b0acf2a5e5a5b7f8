//! Exec and attach with streams: the sessions that are open, and how the
//! host's connections find them.
//!
//! A session is known by a random token. The host sends it at the beginning of
//! each connection it opens to the stream port ([`agent_api::stream`]); a
//! connection with a token that no session waits for is refused. The call that
//! asked for the session lasts as long as it does: its receiver dropped means
//! that the client has gone.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::session_event::Event;
use agent_api::stream::{Stream, TOKEN_LEN, Token};
use agent_api::{SessionEnded, SessionEvent, SessionOpened, SessionStarted, Streams};
use nix::errno::Errno;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::stdio::{CHUNK, Source};
use crate::{log, sys};

/// How long the streams of a session may take to come: milliseconds, unless
/// hundreds are opened at once.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// There are three in the life of a session.
const EVENTS: usize = 4;

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("there is no such session")]
    Unknown,
    #[error("the session has no terminal")]
    NoTerminal,
    #[error("the session's streams were not connected in {} s", CONNECT_TIMEOUT.as_secs())]
    ConnectTimeout,
    #[error("cannot make a session")]
    Create(#[source] Errno),
    #[error("cannot size the session's terminal")]
    Resize(#[source] Errno),
}

/// The host's end of one stream: vsock in a guest.
pub trait Connection: AsyncRead + AsyncWrite + std::fmt::Debug + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + std::fmt::Debug + Send + Unpin> Connection for T {}

pub type Host = Box<dyn Connection>;

/// What a session tells its client.
pub type Events<E> = mpsc::Receiver<Result<SessionEvent, E>>;

#[derive(Debug, Default)]
pub struct Sessions {
    open: Mutex<HashMap<Token, Entry>>,
}

#[derive(Debug)]
struct Entry {
    streams: mpsc::Sender<(Stream, Host)>,
    terminal: Option<Arc<OwnedFd>>,
}

/// The client of a session, and its place among the open ones, which it gives
/// back when it is dropped.
#[derive(Debug)]
pub struct Client<E> {
    sessions: Arc<Sessions>,
    token: Token,
    incoming: mpsc::Receiver<(Stream, Host)>,
    events: mpsc::Sender<Result<SessionEvent, E>>,
}

/// The connections of a session, as far as they were asked for.
#[derive(Debug, Default)]
pub struct Connections {
    pub stdin: Option<Host>,
    pub stdout: Option<Host>,
    pub stderr: Option<Host>,
}

impl Connections {
    fn slot(&mut self, stream: Stream) -> &mut Option<Host> {
        match stream {
            Stream::Stdin => &mut self.stdin,
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    fn has(&self, wanted: &Streams) -> bool {
        self.stdin.is_some() == wanted.stdin
            && self.stdout.is_some() == wanted.stdout
            && self.stderr.is_some() == wanted.stderr
    }
}

impl Sessions {
    fn open(&self) -> MutexGuard<'_, HashMap<Token, Entry>> {
        // Every change of the map is one call.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new session and what its client is told.
    pub fn begin<E>(self: &Arc<Self>) -> Result<(Client<E>, Events<E>), SessionError> {
        let mut token = [0; TOKEN_LEN];
        sys::random(&mut token).map_err(SessionError::Create)?;
        let (streams, incoming) = mpsc::channel(3);
        let (events, receiver) = mpsc::channel(EVENTS);
        let terminal = None;
        self.open().insert(token, Entry { streams, terminal });
        let client = Client {
            sessions: self.clone(),
            token,
            incoming,
            events,
        };
        Ok((client, receiver))
    }

    pub fn has(&self, token: Token) -> bool {
        self.open().contains_key(&token)
    }

    /// A connection that nobody waits for is closed.
    pub fn hand_over(&self, token: Token, stream: Stream, connection: Host) {
        if let Some(entry) = self.open().get(&token) {
            // Full or closed: the session has all it wants.
            let _ = entry.streams.try_send((stream, connection));
        }
    }

    pub fn resize(&self, token: &[u8], width: u32, height: u32) -> Result<(), SessionError> {
        let entry = Token::try_from(token)
            .ok()
            .and_then(|token| self.open().get(&token).map(|entry| entry.terminal.clone()));
        let terminal = entry.ok_or(SessionError::Unknown)?;
        let terminal = terminal.ok_or(SessionError::NoTerminal)?;
        let cut = |size| u16::try_from(size).unwrap_or(u16::MAX);
        let size = libc::winsize {
            ws_row: cut(height),
            ws_col: cut(width),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one winsize (ioctl_tty(2)), which lives.
        let set = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        Errno::result(set).map(drop).map_err(SessionError::Resize)
    }
}

impl<E> Drop for Client<E> {
    fn drop(&mut self) {
        self.sessions.open().remove(&self.token);
    }
}

impl<E: From<SessionError>> Client<E> {
    /// Has the client connect `streams` and takes the connections. None when
    /// there is no client any more.
    pub async fn connect(&mut self, streams: Streams, terminal: bool) -> Option<Connections> {
        self.tell(Event::Opened(SessionOpened {
            token: self.token.to_vec(),
            terminal,
            streams: Some(streams),
        }))
        .await;
        let mut connections = Connections::default();
        let connected = async {
            while !connections.has(&streams) {
                let Some((stream, connection)) = self.incoming.recv().await else {
                    break;
                };
                let wanted = match stream {
                    Stream::Stdin => streams.stdin,
                    Stream::Stdout => streams.stdout,
                    Stream::Stderr => streams.stderr,
                };
                let slot = connections.slot(stream);
                if wanted && slot.is_none() {
                    *slot = Some(connection);
                }
            }
        };
        let connected = tokio::select! {
            () = self.events.closed() => return None,
            connected = timeout(CONNECT_TIMEOUT, connected) => connected,
        };
        // What still comes is closed at once.
        self.incoming.close();
        while self.incoming.try_recv().is_ok() {}
        if connected.is_err() {
            self.fail(SessionError::ConnectTimeout.into()).await;
            return None;
        }
        Some(connections)
    }

    /// Lets the client set the size of `terminal`.
    pub fn has_terminal(&self, terminal: Option<Arc<OwnedFd>>) {
        if let Some(entry) = self.sessions.open().get_mut(&self.token) {
            entry.terminal = terminal;
        }
    }

    pub async fn started(&self) {
        self.tell(Event::Started(SessionStarted {})).await;
    }

    pub async fn ended(self, code: i32, detached: bool) {
        self.tell(Event::Ended(SessionEnded { code, detached }))
            .await;
    }

    pub async fn fail(&self, error: E) {
        // A client that has gone wants no words.
        let _ = self.events.send(Err(error)).await;
    }

    /// Waits until the client has gone.
    pub async fn gone(&self) {
        self.events.closed().await;
    }

    async fn tell(&self, event: Event) {
        let event = Some(event);
        // As above; the queue has room for all of them.
        let _ = self.events.send(Ok(SessionEvent { event })).await;
    }
}

/// Moves output to its client until its end. Without a client, or after one
/// that takes no more, it is thrown away.
pub async fn deliver(mut source: Source, mut client: Option<Host>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = match source.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) => {
                log::warn(format_args!("cannot read the output of a command: {error}"));
                break;
            }
        };
        if let Some(connection) = &mut client
            && connection.write_all(&buffer[..length]).await.is_err()
        {
            client = None;
        }
    }
    end(client).await;
}

/// The client reads the end; one that has gone cannot.
pub async fn end(client: Option<Host>) {
    if let Some(mut client) = client {
        let _ = client.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_session_is_known_for_as_long_as_it_lasts() {
        let sessions = Arc::new(Sessions::default());
        let (client, mut events) = sessions.begin::<SessionError>().unwrap();
        let (other, _) = sessions.begin::<SessionError>().unwrap();
        assert_ne!(client.token, other.token);
        let token = client.token;
        let resized = sessions.resize(&token, 80, 24);
        assert!(matches!(resized, Err(SessionError::NoTerminal)));
        client.ended(3, false).await;
        let event = events.recv().await.unwrap().unwrap().event;
        let (code, detached) = (3, false);
        assert_eq!(event, Some(Event::Ended(SessionEnded { code, detached })));
        for gone in [&token[..], b"short"] {
            let resized = sessions.resize(gone, 80, 24);
            assert!(matches!(resized, Err(SessionError::Unknown)));
        }
        drop(other);
        assert!(sessions.open().is_empty());
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn streams_that_do_not_come_end_the_session() {
        let sessions = Arc::new(Sessions::default());
        let (mut client, mut events) = sessions.begin::<SessionError>().unwrap();
        let streams = Streams {
            stdin: true,
            ..Streams::default()
        };
        assert!(client.connect(streams, false).await.is_none());
        drop(client);
        let opened = events.recv().await.unwrap().unwrap().event;
        assert!(matches!(opened, Some(Event::Opened(_))));
        let failed = events.recv().await.unwrap();
        assert!(matches!(failed, Err(SessionError::ConnectTimeout)));
        assert!(events.recv().await.is_none() && sessions.open().is_empty());

        let (mut client, events) = sessions.begin::<SessionError>().unwrap();
        drop(events);
        assert!(client.connect(streams, false).await.is_none(), "at once");
    }
}
