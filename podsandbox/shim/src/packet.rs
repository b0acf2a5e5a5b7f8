//! Descriptors that arrive on a unix socket beside bytes.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vmm_client::protocol::{MAX_FDS, Request};

/// One request of the control protocol with its descriptors; none at the end.
pub fn request(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> io::Result<Option<(Request, Vec<OwnedFd>)>> {
    let (length, fds) = receive(socket, buffer)?;
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&buffer[..length])?, fds)))
}

/// What one message has brought.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message that is too long or brings too many descriptors",
        ));
    }
    Ok((received.bytes, fds))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_arrives_beside_its_request() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (log, _other) = UnixStream::pair().unwrap();
        let sent = Request::OpenLog {
            container: "c".into(),
            token: None,
        };
        vmm_client::packet::send(&theirs, &sent, &[log.as_fd()]).unwrap();
        let mut buffer = [0; 4096];
        let (request, fds) = request(&ours, &mut buffer).unwrap().unwrap();
        assert!(matches!(request, Request::OpenLog { container, .. } if container == "c"));
        assert_eq!(fds.len(), 1);
        drop(theirs);
        assert!(super::request(&ours, &mut buffer).unwrap().is_none());
    }
}
