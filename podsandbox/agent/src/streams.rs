//! The agent's second vsock port: raw streams from the host, each for a session
//! or for a port on the guest's loopback ([`agent_api::stream`]).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use agent_api::stream::{ACCEPTED, HELLO_LEN, Hello, MAX_REFUSAL, REFUSED};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, Interest, copy_buf, split};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_vsock::VsockListener;

use crate::container::session::{Connection, Sessions};
use crate::{is_host, log, sys};

/// Connections that have not said yet what they are for, and for how long.
pub const MAX_GREETINGS: usize = 256;
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// Forwarded connections at once, each with two buffers.
pub const MAX_FORWARDS: usize = 512;
const BUFFER: usize = 16 * 1024;

/// Bytes of a stream of the host's that the guest holds before they are read.
/// It tells the host of room only once a quarter of Linux' own size is left.
const VSOCK_BUFFER: u64 = 1 << 20;

/// On loopback it is answered at once, unless the listener's queue is full.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Between attempts to accept when the guest is out of memory or descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves for as long as the runtime lives.
pub async fn serve(listener: VsockListener, sessions: Arc<Sessions>) {
    if let Err(error) = sys::set_vsock_buffer(listener.as_fd(), VSOCK_BUFFER) {
        log::warn(format_args!("streams have small buffers: {error}"));
    }
    let greetings = Arc::new(Semaphore::new(MAX_GREETINGS));
    let forwards = Arc::new(Semaphore::new(MAX_FORWARDS));
    // The semaphore is never closed.
    while let Ok(place) = greetings.clone().acquire_owned().await {
        match listener.accept().await {
            // Programs of the guest have no business here.
            Ok((_, peer)) if !is_host(&peer) => {}
            Ok((stream, _)) => {
                tokio::spawn(greet(stream, place, sessions.clone(), forwards.clone()));
            }
            Err(error) => {
                log::warn(format_args!("cannot accept a stream: {error}"));
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Takes what a connection of the host's is for, and serves it.
pub async fn greet(
    mut stream: impl Connection + AsFd + 'static,
    place: OwnedSemaphorePermit,
    sessions: Arc<Sessions>,
    forwards: Arc<Semaphore>,
) {
    let mut bytes = [0; HELLO_LEN];
    let read = timeout(GREETING_TIMEOUT, stream.read_exact(&mut bytes)).await;
    drop(place);
    // Who says nothing, or nothing that is known, is not answered.
    let hello = match read {
        Ok(Ok(_)) => Hello::decode(&bytes),
        Ok(Err(_)) | Err(_) => None,
    };
    match hello {
        Some(Hello::Session { token, stream: of }) => {
            // A host that has gone needs no answer; its session ends by itself.
            if !sessions.has(token) {
                refuse(stream, "there is no such session").await;
            } else if stream.write_all(&[ACCEPTED]).await.is_ok() {
                sessions.hand_over(token, of, Box::new(stream));
            }
        }
        Some(Hello::Forward { port }) => forward(stream, port, &forwards).await,
        None => {}
    }
}

async fn forward(mut host: impl Connection + AsFd, port: u16, forwards: &Arc<Semaphore>) {
    let target = match forwards.try_acquire() {
        Ok(place) => dial(port).await.map(|target| (place, target)),
        Err(_) => Err(format!(
            "the pod forwards {MAX_FORWARDS} connections already"
        )),
    };
    let (_place, target) = match target {
        Ok(target) => target,
        Err(why) => return refuse(host, &why).await,
    };
    if host.write_all(&[ACCEPTED]).await.is_err() {
        return;
    }
    if let Err(error) = splice(host, target).await {
        log::warn(format_args!("port {port}: {error}"));
    }
}

async fn refuse(mut host: impl Connection, why: &str) {
    let mut answer = vec![REFUSED];
    answer.extend(why.bytes().take(MAX_REFUSAL));
    // A host that has gone needs no answer.
    let _ = host.write_all(&answer).await;
}

async fn dial(port: u16) -> Result<TcpStream, String> {
    let mut refusals = Vec::new();
    for address in [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ] {
        match timeout(DIAL_TIMEOUT, TcpStream::connect((address, port))).await {
            Ok(Ok(target)) => return Ok(target),
            Ok(Err(error)) => refusals.push(format!("{address}: {error}")),
            Err(_) => refusals.push(format!("{address}: no answer")),
        }
    }
    Err(refusals.join(", "))
}

/// Moves bytes both ways; each direction has its own end. A host that has gone
/// for good ends both.
async fn splice(host: impl Connection + AsFd, mut target: TcpStream) -> io::Result<()> {
    target.set_nodelay(true)?;
    let probe = host.as_fd().try_clone_to_owned()?;
    let (from_host, mut to_host) = split(host);
    let (from_target, mut to_target) = target.split();
    // A side that breaks is at its end: the other learns of it as it would
    // without us between.
    let up = async {
        let mut from_host = BufReader::with_capacity(BUFFER, from_host);
        let _ = copy_buf(&mut from_host, &mut to_target).await;
        let _ = to_target.shutdown().await;
    };
    let down = async {
        let mut from_target = BufReader::with_capacity(BUFFER, from_target);
        let _ = copy_buf(&mut from_target, &mut to_host).await;
        let _ = to_host.shutdown().await;
    };
    tokio::pin!(up, down);
    tokio::select! {
        () = &mut down => {
            up.await;
            Ok(())
        }
        () = &mut up => tokio::select! {
            () = down => Ok(()),
            gone = gone(probe) => gone,
        },
    }
}

/// Waits until the host reads no more. Its half-close says nothing about that,
/// and poll(2) tells the two apart only while there is something to send; a
/// send of nothing does at any time. Each change of the connection wakes who
/// waits to write.
async fn gone(socket: OwnedFd) -> io::Result<()> {
    let socket = sys::async_fd(socket, Interest::WRITABLE)?;
    loop {
        let mut ready = socket.writable().await?;
        match send(socket.as_raw_fd(), &[], MsgFlags::MSG_NOSIGNAL) {
            Ok(_) | Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(_) => return Ok(()),
        }
    }
}
