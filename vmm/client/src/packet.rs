//! Packets of a SOCK_SEQPACKET unix socket: one JSON message each, descriptors
//! beside it by `SCM_RIGHTS`.
//!
//! Sending is shared by both sides. Receiving here takes no descriptors (the
//! kernel drops those that come): the VMM answers with words only, and its
//! word is not trusted with more.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdUnixDatagram;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::UnixDatagram;

use crate::protocol::MAX_MESSAGE;

/// Sends `message` as one packet, `fds` beside it.
pub fn send(socket: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    if json.len() > MAX_MESSAGE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("message of {} bytes, {MAX_MESSAGE} allowed", json.len()),
        ));
    }
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let cmsgs: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let sent = sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(&json)],
        cmsgs,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent != json.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}

/// Receives one packet; `None` when the peer has closed its end.
pub fn recv<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<T>> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut iov = [IoSliceMut::new(&mut buffer)];
    let received = loop {
        match recvmsg::<()>(
            socket.as_fd().as_raw_fd(),
            &mut iov,
            None,
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            // The peer has gone without reading all it was sent. What it sent
            // itself, why its machine has ended perhaps, comes first.
            Err(Errno::ECONNRESET) => {}
            received => break received?,
        }
    };
    let (len, flags) = (received.bytes, received.flags);
    if flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("packet of more than {MAX_MESSAGE} bytes"),
        ));
    }
    if len == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&buffer[..len])?))
}

/// A packet socket in a tokio runtime. A datagram socket in name, because
/// tokio knows no SOCK_SEQPACKET; nothing but readiness is asked of it.
#[derive(Debug)]
pub(crate) struct AsyncPackets(UnixDatagram);

impl AsyncPackets {
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = StdUnixDatagram::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self(UnixDatagram::from_std(socket)?))
    }

    pub(crate) async fn send(
        &self,
        message: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        self.0
            .async_io(Interest::WRITABLE, || send(&self.0, message, fds))
            .await
    }

    pub(crate) async fn recv<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        self.0.async_io(Interest::READABLE, || recv(&self.0)).await
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    #[test]
    fn the_last_word_of_a_peer_that_has_not_read_all_is_heard() {
        let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
        let (ours, theirs) = socketpair(family, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        send(&ours, &"unread", &[]).unwrap();
        send(&theirs, &"the last", &[]).unwrap();
        drop(theirs);
        assert_eq!(recv::<String>(&ours).unwrap().as_deref(), Some("the last"));
        assert_eq!(recv::<String>(&ours).unwrap(), None);
    }
}
