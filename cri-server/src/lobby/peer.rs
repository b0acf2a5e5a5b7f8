//! Whose a connection is, as far as the node can tell.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use tokio::net::TcpStream;

/// `linux/sock_diag.h`: a request for one socket, and its answer.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
/// `INET_DIAG_NOCOOKIE`: whichever socket has the addresses.
const NO_COOKIE: [u8; 8] = [0xff; 8];
const ANY_STATE: [u8; 4] = [0xff; 4];
/// Of `nlmsghdr` and `inet_diag_req_v2`.
const REQUEST_BYTES: usize = 16 + 56;
/// Where `inet_diag_msg` has uid and inode, after `nlmsghdr`.
const UID_AT: usize = 16 + 64;
const INODE_AT: usize = 16 + 68;

/// Who may hold places for connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// A user of this node.
    Uid(u32),
    /// A machine; of IPv6 a network of 64 bits, which one machine can have all
    /// of.
    Address(IpAddr),
}

impl Peer {
    /// Of a connection that was accepted from `remote`.
    pub fn of(stream: &TcpStream, remote: SocketAddr) -> Self {
        let remote = plain(remote);
        // A connection from this node has one of its addresses at both ends.
        let local = stream.local_addr().ok().map(plain);
        let local = local.filter(|local| remote.ip().is_loopback() || local.ip() == remote.ip());
        match local.map(|local| user_of(remote, local)) {
            Some(Ok(Some(uid))) => Self::Uid(uid),
            Some(Err(error)) => {
                tracing::debug!(%error, "cannot tell whose a streaming connection is");
                Self::machine(remote.ip())
            }
            None | Some(Ok(None)) => Self::machine(remote.ip()),
        }
    }

    fn machine(ip: IpAddr) -> Self {
        Self::Address(match ip {
            IpAddr::V4(_) => ip,
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        })
    }
}

/// An IPv4 address that a socket of both families shows as one of IPv6.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The user of the socket of this network namespace that is bound to `from` and
/// connected to `to`; none if it is nobody's any more.
fn user_of(from: SocketAddr, to: SocketAddr) -> nix::Result<Option<u32>> {
    let diag = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    send(diag.as_raw_fd(), &request(from, to), MsgFlags::empty())?;
    let mut answer = [0; 1024];
    // The kernel has answered before send returns.
    let length = recv(diag.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    told(answer.get(..length).unwrap_or_default())
}

fn request(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let family = if from.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let mut bytes = Vec::with_capacity(REQUEST_BYTES);
    bytes.extend((REQUEST_BYTES as u32).to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence number and port: there is one request.
    bytes.extend([0; 8]);
    bytes.extend([family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(ANY_STATE);
    bytes.extend(from.port().to_be_bytes());
    bytes.extend(to.port().to_be_bytes());
    for address in [from, to] {
        let mut field = [0; 16];
        match address.ip() {
            IpAddr::V4(ip) => field[..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => field = ip.octets(),
        }
        bytes.extend(field);
    }
    // Any interface.
    bytes.extend([0; 4]);
    bytes.extend(NO_COOKIE);
    bytes
}

fn told(answer: &[u8]) -> nix::Result<Option<u32>> {
    let word = |at: usize| -> Option<u32> {
        let bytes = answer.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok());
    match kind.map(u16::from_ne_bytes) {
        Some(SOCK_DIAG_BY_FAMILY) => {}
        // The kernel's error, negative.
        Some(kind) if i32::from(kind) == libc::NLMSG_ERROR => {
            let code = word(16).map_or(0, |code| code.cast_signed().saturating_neg());
            return match Errno::from_raw(code) {
                Errno::ENOENT => Ok(None),
                error => Err(error),
            };
        }
        _ => return Err(Errno::EBADMSG),
    }
    let (Some(uid), Some(inode)) = (word(UID_AT), word(INODE_AT)) else {
        return Err(Errno::EBADMSG);
    };
    // One that was closed has no file any more, and its uid is no one's.
    Ok((inode != 0).then_some(uid))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::Ipv4Addr;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};

    use tokio::net::TcpListener;

    use super::*;

    const NOBODY: u32 = 65534;

    async fn accepted(address: &str) -> (TcpListener, TcpStream, Peer) {
        let listener = TcpListener::bind(address).await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (stream, remote) = listener.accept().await.unwrap();
        let peer = Peer::of(&stream, remote);
        (listener, client, peer)
    }

    #[tokio::test]
    async fn a_connection_from_this_node_is_its_users() {
        let own = Peer::Uid(nix::unistd::getuid().as_raw());
        assert_eq!(accepted("127.0.0.1:0").await.2, own);
        assert_eq!(accepted("[::1]:0").await.2, own);
        // Another's, who is known only by the socket.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut client = Command::new("bash")
            .args([
                "-c",
                &format!("exec 3<>/dev/tcp/127.0.0.1/{port}; read line"),
            ])
            .uid(NOBODY)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let (stream, remote) = listener.accept().await.unwrap();
        assert_eq!(Peer::of(&stream, remote), Peer::Uid(NOBODY));
        drop(client.stdin.take());
        client.wait().unwrap();
        // It has gone: nobody's, and not root's.
        let loopback = Peer::Address(Ipv4Addr::LOCALHOST.into());
        assert_eq!(Peer::of(&stream, remote), loopback);
        // Through a socket of both families.
        let listener = TcpListener::bind("[::]:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        let (stream, remote) = listener.accept().await.unwrap();
        assert!(remote.is_ipv6());
        assert_eq!(Peer::of(&stream, remote), own);
        drop(stream);
        assert_eq!((&client).read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_machine_is_its_address_or_its_network() {
        let machine = |ip: &str| Peer::machine(ip.parse().unwrap());
        assert_ne!(machine("10.0.0.1"), machine("10.0.0.2"));
        assert_eq!(machine("2001:db8::1"), machine("2001:db8::ffff:2"));
        assert_ne!(machine("2001:db8::1"), machine("2001:db8:0:1::1"));
    }

    #[test]
    fn answers_that_are_none_are_refused() {
        let mut answer = vec![0; 124];
        answer[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        answer[UID_AT..UID_AT + 4].copy_from_slice(&7_u32.to_ne_bytes());
        assert_eq!(told(&answer), Ok(None), "a socket without a file");
        answer[INODE_AT] = 1;
        assert_eq!(told(&answer), Ok(Some(7)));
        for length in 0..INODE_AT + 4 {
            assert_eq!(told(&answer[..length]), Err(Errno::EBADMSG), "{length}");
        }
        let mut error = vec![0; 36];
        error[4] = 2;
        for (code, expected) in [
            (-libc::ENOENT, Ok(None)),
            (-libc::EPERM, Err(Errno::EPERM)),
            (i32::MIN, Err(Errno::UnknownErrno)),
        ] {
            error[16..20].copy_from_slice(&code.to_ne_bytes());
            assert_eq!(told(&error), expected);
        }
    }
}
