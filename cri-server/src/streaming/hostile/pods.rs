//! Pods whose processes are tasks.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use podsandbox::Session;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf, duplex};
use tokio::sync::{mpsc, watch};

use crate::streaming::session::{AttachRequest, Backend, ExecRequest, Socket};

#[derive(Clone, Default)]
pub struct Pods(Arc<Seen>);

#[derive(Default)]
pub struct Seen {
    /// Bytes that were taken from endless outputs.
    pub taken: AtomicUsize,
    /// Sessions that live.
    pub live: watch::Sender<usize>,
}

impl std::ops::Deref for Pods {
    type Target = Seen;
    fn deref(&self) -> &Seen {
        &self.0
    }
}

/// Counts a session as long as its exit is waited for.
struct Live(Pods);

impl Live {
    fn new(pods: &Pods) -> Self {
        pods.live.send_modify(|live| *live += 1);
        Self(pods.clone())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.live.send_modify(|live| *live -= 1);
    }
}

/// Zeros without end.
struct Endless(Pods);

impl AsyncRead for Endless {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let len = buffer.remaining();
        buffer.put_slice(&vec![0; len]);
        self.0.taken.fetch_add(len, Ordering::SeqCst);
        Poll::Ready(Ok(()))
    }
}

impl Pods {
    fn session(&self, argv: &[String]) -> Result<Session, String> {
        let live = Live::new(self);
        let (stdin, mut read) = duplex(64 << 10);
        let (mut write, stdout) = duplex(64 << 10);
        let (mut complain, stderr) = duplex(64 << 10);
        let (resize, mut sizes) = mpsc::channel::<(u16, u16)>(4);
        let mut session = Session {
            stdin: Some(Box::new(stdin)),
            stdout: Some(Box::new(stdout)),
            stderr: Some(Box::new(stderr)),
            resize: Some(resize),
            exit: Box::pin(std::future::pending()),
        };
        let words: Vec<&str> = argv.iter().map(String::as_str).collect();
        let work = match *words {
            ["cat"] => tokio::spawn(async move {
                let copied = tokio::io::copy(&mut read, &mut write).await;
                i32::from(copied.is_err())
            }),
            ["exit", code] => {
                let code = code.parse().map_err(|_| format!("no code {code}"))?;
                tokio::spawn(async move {
                    drop(read);
                    // Fails where the client did not ask for the stream.
                    let said = write.write_all(b"out").await;
                    let complained = complain.write_all(b"err").await;
                    assert!(said.is_ok() || complained.is_ok());
                    code
                })
            }
            ["sizes"] => tokio::spawn(async move {
                while let Some((width, height)) = sizes.recv().await {
                    let line = format!("{width}x{height}\n");
                    if write.write_all(line.as_bytes()).await.is_err() {
                        break;
                    }
                }
                0
            }),
            ["flood"] => {
                session.stdout = Some(Box::new(Endless(self.clone())));
                tokio::spawn(std::future::pending())
            }
            // Takes no input, says nothing.
            ["sleep"] => tokio::spawn(async move {
                let _held = (read, write, complain);
                std::future::pending().await
            }),
            _ => return Err(format!("no program {argv:?}")),
        };
        session.exit = Box::pin(async move {
            let _live = live;
            work.await.map_err(|error| error.to_string())
        });
        Ok(session)
    }
}

#[tonic::async_trait]
impl Backend for Pods {
    async fn exec(&self, request: ExecRequest) -> Result<Session, String> {
        self.session(&request.argv)
    }

    async fn attach(&self, _: AttachRequest) -> Result<Session, String> {
        self.session(&["cat".to_owned()])
    }

    /// What listens there sends back what it gets, in upper case.
    async fn port_forward(&self, pod_id: &str, port: u16) -> Result<Box<dyn Socket>, String> {
        assert_eq!(pod_id, "p");
        if port != 80 {
            return Err("connection refused".to_owned());
        }
        let (ours, theirs) = duplex(64 << 10);
        tokio::spawn(shout(theirs));
        Ok(Box::new(ours))
    }
}

async fn shout(stream: DuplexStream) {
    let (mut read, mut write) = tokio::io::split(stream);
    let mut buffer = [0; 512];
    while let Ok(len @ 1..) = read.read(&mut buffer).await {
        buffer[..len].make_ascii_uppercase();
        if write.write_all(&buffer[..len]).await.is_err() {
            return;
        }
    }
}
