//! Numbered channels: the first byte of each message names the channel that
//! the rest of it is for (`v4.channel.k8s.io`). From `v5` on, a message of
//! 255 and a channel's number ends that channel.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite};

use super::connection::{Connection, Messages};
use super::frame;
use crate::streaming::inbox::{Budget, Inbox, InboxSender, inbox};
use crate::streaming::outbox::{Closed, Frame, Outbox};

const CLOSE_SIGNAL: u8 = 255;

pub struct Channels {
    pub connection: Connection,
    inboxes: BTreeMap<u8, Inbox>,
}

impl Channels {
    /// The client may write to the channels of `readable`; what it sends on
    /// others is dropped.
    pub fn start<IO>(
        io: IO,
        idle: Duration,
        readable: impl IntoIterator<Item = u8>,
        close_signal: bool,
    ) -> Self
    where
        IO: AsyncRead + AsyncWrite + Send + 'static,
    {
        let budget = Budget::default();
        let mut inboxes = BTreeMap::new();
        let mut demultiplexer = Demultiplexer {
            senders: BTreeMap::new(),
            close_signal,
            within: Within::Start,
        };
        for number in readable {
            let (sender, inbox) = inbox(&budget, None);
            inboxes.insert(number, inbox);
            demultiplexer.senders.insert(number, sender);
        }
        Self {
            connection: Connection::start(io, idle, demultiplexer),
            inboxes,
        }
    }

    pub fn inbox(&mut self, number: u8) -> Option<Inbox> {
        self.inboxes.remove(&number)
    }

    pub fn channel(&self, number: u8) -> Channel {
        Channel {
            number,
            outbox: self.connection.outbox().clone(),
        }
    }
}

/// Where output goes.
pub struct Channel {
    number: u8,
    outbox: Outbox,
}

impl Channel {
    pub async fn send(&mut self, data: Bytes) -> Result<(), Closed> {
        let head = frame::binary(&[self.number], data.len());
        self.outbox.data(Frame::with(head, data)).await
    }
}

struct Demultiplexer {
    senders: BTreeMap<u8, InboxSender>,
    close_signal: bool,
    within: Within,
}

/// Where in a message we are.
#[derive(Clone, Copy)]
enum Within {
    Start,
    Channel(u8),
    /// After the signal.
    Close,
    Closed,
}

impl Messages for Demultiplexer {
    async fn piece(&mut self, mut data: Bytes, last: bool) -> bool {
        if let (Within::Start, Some(&number)) = (self.within, data.first()) {
            data.advance(1);
            self.within = if self.close_signal && number == CLOSE_SIGNAL {
                Within::Close
            } else {
                Within::Channel(number)
            };
        }
        match self.within {
            Within::Start => {}
            Within::Channel(number) => {
                if let Some(sender) = self.senders.get(&number) {
                    // Where nobody reads any more it is dropped, as the
                    // process's own pipe would.
                    let _read = sender.send(data).await;
                }
            }
            Within::Close => {
                if let Some(&number) = data.first() {
                    self.within = Within::Closed;
                    if data.len() > 1 {
                        return false;
                    }
                    if let Some(sender) = self.senders.remove(&number) {
                        sender.end();
                    }
                }
            }
            Within::Closed if data.is_empty() => {}
            Within::Closed => return false,
        }
        if last {
            let complete = !matches!(self.within, Within::Close);
            self.within = Within::Start;
            return complete;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channels(close_signal: bool) -> (Demultiplexer, Inbox, Inbox) {
        let budget = Budget::default();
        let (stdin, stdin_inbox) = inbox(&budget, None);
        let (resize, resize_inbox) = inbox(&budget, None);
        let demultiplexer = Demultiplexer {
            senders: BTreeMap::from([(0, stdin), (4, resize)]),
            close_signal,
            within: Within::Start,
        };
        (demultiplexer, stdin_inbox, resize_inbox)
    }

    async fn text(inbox: &mut Inbox) -> Option<String> {
        let data = inbox.recv().await.unwrap()?;
        Some(String::from_utf8(data.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn messages_go_to_their_channels_however_they_are_cut() {
        let (mut channels, mut stdin, mut resize) = channels(true);
        let pieces: [(&[u8], bool); 9] = [
            (b"\0hello", true),
            (b"", false),
            (b"\0", false),
            (b"wor", false),
            (b"ld", true),
            (b"\x04{}", true),
            (b"\x07nobody's", true),
            (b"", true),
            (b"\0", true),
        ];
        for (data, last) in pieces {
            assert!(channels.piece(Bytes::from_static(data), last).await);
        }
        assert_eq!(text(&mut stdin).await.as_deref(), Some("hello"));
        assert_eq!(text(&mut stdin).await.as_deref(), Some("wor"));
        assert_eq!(text(&mut stdin).await.as_deref(), Some("ld"));
        assert_eq!(text(&mut resize).await.as_deref(), Some("{}"));
        for (data, last) in [(&[255][..], false), (&[0], true)] {
            assert!(channels.piece(Bytes::copy_from_slice(data), last).await);
        }
        assert_eq!(text(&mut stdin).await, None);
        drop(channels);
        assert!(resize.recv().await.is_err(), "lost, not ended");
    }

    #[tokio::test]
    async fn a_close_signal_names_one_channel() {
        for bad in [&[255][..], &[255, 0, 0]] {
            let (mut channels, ..) = channels(true);
            assert!(!channels.piece(Bytes::copy_from_slice(bad), true).await);
        }
        let (mut channels, ..) = channels(false);
        assert!(channels.piece(Bytes::from_static(&[255, 0, 0]), true).await);
    }
}
