//! What a host client says first: `CONNECT <port>\n`, after which it waits for
//! `OK <host port>\n` and the connection is the guest's.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{MsgFlags, recv};

use super::connection::is_retry;

/// `CONNECT 4294967295\n` and a little room.
const MAX_LINE: usize = 32;

#[derive(Debug)]
pub(super) struct Greeting {
    line: [u8; MAX_LINE],
    len: usize,
    /// Orders clients, so that the oldest can go when too many wait.
    pub(super) serial: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeted {
    NotYet,
    /// The guest's port.
    Connect(u32),
    /// Not a greeting, or the client has gone.
    Refuse,
}

impl Greeting {
    pub(super) fn new(serial: u64) -> Self {
        Self {
            line: [0; MAX_LINE],
            len: 0,
            serial,
        }
    }

    /// Reads up to the end of the line and not a byte further: what follows is
    /// the guest's.
    pub(super) fn read(&mut self, socket: impl AsFd) -> Greeted {
        let fd = socket.as_fd().as_raw_fd();
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let room = &mut self.line[self.len..];
        let seen = match recv(fd, room, peek).map_err(io::Error::from) {
            Ok(0) => return Greeted::Refuse,
            Ok(n) => n,
            Err(e) if is_retry(&e) => return Greeted::NotYet,
            Err(_) => return Greeted::Refuse,
        };
        let end = room[..seen].iter().position(|&b| b == b'\n');
        let wanted = end.map_or(seen, |at| at + 1);
        match recv(fd, &mut room[..wanted], MsgFlags::MSG_DONTWAIT) {
            Ok(n) if n == wanted => self.len += n,
            _ => return Greeted::Refuse,
        }
        match end {
            Some(_) => match parse(&self.line[..self.len]) {
                Some(port) => Greeted::Connect(port),
                None => Greeted::Refuse,
            },
            None if self.len == MAX_LINE => Greeted::Refuse,
            None => Greeted::NotYet,
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_a_port_number_is_a_greeting() {
        assert_eq!(parse(b"CONNECT 1024\n"), Some(1024));
        assert_eq!(parse(b"CONNECT 4294967295\n"), Some(u32::MAX));
        let bad: [&[u8]; 8] = [
            b"CONNECT 4294967296\n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT \n",
            b"CONNECT 1 \n",
            b"connect 1\n",
            b"CONNECT 1\r\n",
            b"\xff\n",
        ];
        for line in bad {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_greeting_in_pieces_leaves_what_follows_it() {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        let mut greeting = Greeting::new(0);
        assert_eq!(greeting.read(&server), Greeted::NotYet);
        client.write_all(b"CONN").unwrap();
        assert_eq!(greeting.read(&server), Greeted::NotYet);
        client.write_all(b"ECT 52\nhello").unwrap();
        assert_eq!(greeting.read(&server), Greeted::Connect(52));
        drop(client);
        let mut rest = String::new();
        server.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn an_endless_line_and_a_vanished_client_are_refused() {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&[b'C'; 64]).unwrap();
        assert_eq!(Greeting::new(0).read(&server), Greeted::Refuse);

        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(Greeting::new(0).read(&server), Greeted::Refuse);
    }
}
