//! The VMM's end of packet sockets: messages with descriptors beside them.
//! The client crate's `packet` sends; it cannot take descriptors.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::de::DeserializeOwned;
use vmm_client::protocol::{MAX_FDS, MAX_MESSAGE};

use crate::transport::invalid;

/// Receives one message with its descriptors; `None` when the peer has closed
/// its end.
pub fn recv<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut space = cmsg_space!([i32; MAX_FDS]);
    let mut iov = [IoSliceMut::new(&mut buffer)];
    let received = loop {
        match recvmsg::<()>(
            socket.as_fd().as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            // The peer has gone without reading all it was sent. What it sent
            // itself comes first, the end after that.
            Err(Errno::EINTR | Errno::ECONNRESET) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for cmsg in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = cmsg {
            fds.extend(raw.into_iter().map(|fd| {
                // SAFETY: the kernel has just made this descriptor for this
                // process and nothing else knows it.
                unsafe { OwnedFd::from_raw_fd(fd) }
            }));
        }
    }
    let (len, flags) = (received.bytes, received.flags);
    if flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(invalid(format!(
            "a message with more than {MAX_FDS} descriptors"
        )));
    }
    if flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(invalid(format!(
            "a message of more than {MAX_MESSAGE} bytes"
        )));
    }
    if len == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&buffer[..len])?, fds)))
}
