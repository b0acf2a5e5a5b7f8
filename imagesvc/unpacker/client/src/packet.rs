//! Packets of a SOCK_SEQPACKET unix socket: one JSON message each.
//!
//! After its order an unpacker uses nothing but `read` and `write`: no other
//! system call for messages is open to it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{read, retry_on_intr, write};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::protocol::{MAX_FDS, MAX_MESSAGE};

/// Sends `message` as one packet.
///
/// # Errors
/// The peer is gone, or the message is too long.
pub fn send(socket: impl AsFd, message: &impl Serialize) -> io::Result<()> {
    let json = encode(message)?;
    whole(retry_on_intr(|| write(&socket, &json))?, &json)
}

/// Sends `message` as one packet, `fds` beside it.
///
/// # Errors
/// The peer is gone, or the message is too long.
pub fn send_with(
    socket: impl AsFd,
    message: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let json = encode(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !rights.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(invalid(format!("{} descriptors", fds.len())));
    }
    let data = [IoSlice::new(&json)];
    let sent = retry_on_intr(|| sendmsg(&socket, &data, &mut rights, SendFlags::NOSIGNAL))?;
    whole(sent, &json)
}

/// Receives one packet; `None` when the peer has closed its end. Descriptors
/// beside it are dropped.
///
/// # Errors
/// The packet is no such message.
pub fn recv<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<T>> {
    let mut buffer = vec![0; MAX_MESSAGE + 1];
    loop {
        match retry_on_intr(|| read(&socket, &mut buffer)) {
            Ok(len) => return decode(&buffer[..len]),
            // The peer has gone without reading all it was sent. What it sent
            // itself comes first, the end after that.
            Err(rustix::io::Errno::CONNRESET) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one packet and the descriptors beside it.
///
/// # Errors
/// The packet is no such message.
pub fn recv_with<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_MESSAGE + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        let mut data = [IoSliceMut::new(&mut buffer)];
        recvmsg(&socket, &mut data, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(invalid(format!("more than {MAX_FDS} descriptors")));
    }
    let message = decode(&buffer[..received.bytes])?;
    Ok(message.map(|message| (message, fds)))
}

fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(message)?;
    if json.len() > MAX_MESSAGE {
        return Err(invalid(format!("a message of {} bytes", json.len())));
    }
    Ok(json)
}

fn decode<T: DeserializeOwned>(packet: &[u8]) -> io::Result<Option<T>> {
    if packet.is_empty() {
        return Ok(None);
    }
    if packet.len() > MAX_MESSAGE {
        return Err(invalid(format!(
            "a message of more than {MAX_MESSAGE} bytes"
        )));
    }
    Ok(Some(serde_json::from_slice(packet)?))
}

fn whole(sent: usize, json: &[u8]) -> io::Result<()> {
    if sent == json.len() {
        return Ok(());
    }
    Err(io::ErrorKind::WriteZero.into())
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn the_last_word_of_a_peer_that_has_not_read_all_is_heard() {
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        send(&ours, &"unread").unwrap();
        send(&theirs, &"the last").unwrap();
        drop(theirs);
        assert_eq!(recv::<String>(&ours).unwrap().as_deref(), Some("the last"));
        assert_eq!(recv::<String>(&ours).unwrap(), None);
    }
}
