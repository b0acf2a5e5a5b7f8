//! The log thread: an event loop over the guest's streams and the commands of
//! [`super::LogHandle`].

mod rotation;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use slab::Slab;
use vmm_client::LogToken;

use super::file::LogFile;
use super::framing::Framer;
use super::header::{self, MAX_HEADER};
use super::unnamed::{self, Age, Unnamed};
use super::{LogError, MAX_LOGS, StreamSlot};
use rotation::OldFile;

/// Read from one stream before the next has its turn.
const READ_BYTES: usize = 64 * 1024;

/// Kept for records between reads. Empty lines make 45 bytes out of one.
const RECORDS_KEPT: usize = 512 * 1024;

/// Reads from a stream whose machine has ended: more than a socket holds.
const FINISH_READS: usize = 1024;

/// How long a rotation waits for a line that was begun in the old file. A
/// container that never ends its line must not keep it.
const ROTATION_WAIT: Duration = Duration::from_secs(1);

const TOKEN_WAKE: u64 = u64::MAX;

/// How long some things are waited for.
pub(super) struct Waits {
    /// The end of a line in the old file of a rotation.
    pub(super) rotation: Duration,
    /// A stream's header.
    pub(super) header: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            rotation: ROTATION_WAIT,
            header: unnamed::PATIENCE,
        }
    }
}

pub(super) enum Command {
    Open {
        container: String,
        token: Option<LogToken>,
        file: File,
        reply: Sender<Result<(), LogError>>,
    },
    Close {
        container: String,
        reply: Sender<()>,
    },
    Stream {
        socket: UnixStream,
        slot: StreamSlot,
    },
    Finish {
        reply: Sender<()>,
    },
}

struct Log {
    file: LogFile,
    /// What a stream has to name.
    token: Option<LogToken>,
    /// A file being replaced, while lines begun in it are not ended.
    old: Option<OldFile>,
    streams: usize,
    closing: bool,
}

struct Stream {
    socket: UnixStream,
    state: State,
    _slot: StreamSlot,
}

enum State {
    /// What has come of the header.
    Header(Vec<u8>, Age),
    Body {
        container: String,
        framer: Framer,
        /// Ends its line in the old file of a rotation.
        in_old: bool,
    },
}

pub(super) struct Service {
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    epoll: Epoll,
    streams: Slab<Stream>,
    logs: HashMap<String, Log>,
    buffer: Vec<u8>,
    records: Vec<u8>,
    unnamed: Unnamed,
    rotation_wait: Duration,
}

impl Service {
    pub(super) fn new(
        commands: Receiver<Command>,
        wake: Arc<EventFd>,
        waits: Waits,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*wake, EpollEvent::new(EpollFlags::EPOLLIN, TOKEN_WAKE))?;
        Ok(Self {
            commands,
            wake,
            epoll,
            streams: Slab::new(),
            logs: HashMap::new(),
            buffer: vec![0; READ_BYTES],
            records: Vec::new(),
            unnamed: Unnamed::new(waits.header),
            rotation_wait: waits.rotation,
        })
    }

    pub(super) fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let n = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(n) => n,
                Err(Errno::EINTR) => 0,
                Err(error) => {
                    tracing::error!(%error, "the log thread cannot wait for events; it ends");
                    return;
                }
            };
            for event in &events[..n] {
                if event.data() == TOKEN_WAKE {
                    if !self.commands() {
                        return;
                    }
                } else if let Ok(key) = usize::try_from(event.data()) {
                    self.read(key);
                }
            }
            self.end_overdue_rotations();
            self.drop_overdue_streams();
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let deadlines = self.logs.values().filter_map(|log| log.old.as_ref());
        let deadlines = deadlines.map(|old| old.deadline);
        let Some(next) = deadlines.chain(self.unnamed.deadline()).min() else {
            return EpollTimeout::NONE;
        };
        let left = next.saturating_duration_since(Instant::now());
        // Rounded up, so as not to wake a fraction too early again and again.
        EpollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(EpollTimeout::ZERO)
    }

    /// False: the last handle is gone.
    fn commands(&mut self) -> bool {
        // Read before the commands: one that comes later rings again.
        let _ = self.wake.read();
        loop {
            match self.commands.try_recv() {
                Ok(Command::Open {
                    container,
                    token,
                    file,
                    reply,
                }) => self.open(container, token, file, reply),
                Ok(Command::Close { container, reply }) => {
                    self.close(&container);
                    // Whoever asked may have gone.
                    let _ = reply.send(());
                }
                Ok(Command::Stream { socket, slot }) => self.add_stream(socket, slot),
                Ok(Command::Finish { reply }) => {
                    self.finish();
                    let _ = reply.send(());
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => {
                    self.finish();
                    return false;
                }
            }
        }
    }

    fn open(
        &mut self,
        container: String,
        token: Option<LogToken>,
        file: File,
        reply: Sender<Result<(), LogError>>,
    ) {
        let file = LogFile::new(&container, file);
        if self.logs.contains_key(&container) {
            return self.rotate(&container, token, file, reply);
        }
        let result = if self.logs.len() < MAX_LOGS {
            let log = Log {
                file,
                token,
                old: None,
                streams: 0,
                closing: false,
            };
            self.logs.insert(container, log);
            Ok(())
        } else {
            Err(LogError::TooManyLogs)
        };
        // Whoever asked may have gone.
        let _ = reply.send(result);
    }

    fn close(&mut self, container: &str) {
        if let Some(log) = self.logs.get_mut(container) {
            log.closing = true;
            self.forget_if_done(container);
        }
    }

    fn forget_if_done(&mut self, container: &str) {
        if let Some(log) = self.logs.get(container)
            && log.closing
            && log.streams == 0
        {
            self.logs.remove(container);
        }
    }

    fn add_stream(&mut self, socket: UnixStream, slot: StreamSlot) {
        let entry = self.streams.vacant_entry();
        let event = EpollEvent::new(EpollFlags::EPOLLIN, entry.key() as u64);
        if let Err(error) = self.epoll.add(&socket, event) {
            tracing::warn!(%error, "an output stream cannot be watched; it is closed");
            return;
        }
        let age = self.unnamed.add(entry.key());
        entry.insert(Stream {
            socket,
            state: State::Header(Vec::new(), age),
            _slot: slot,
        });
        while let Some(oldest) = self.unnamed.surplus() {
            // It may have said it by now.
            self.read(oldest);
            if self.unnamed.surplus() == Some(oldest) {
                tracing::warn!("many output streams do not say whose they are; one is closed");
                self.refuse(oldest);
            }
        }
    }

    fn drop_overdue_streams(&mut self) {
        let now = Instant::now();
        while let Some(key) = self.unnamed.pop_overdue(now) {
            tracing::warn!("an output stream did not say in time whose it is; it is closed");
            self.streams.remove(key);
        }
    }

    /// Closes a stream that is no container's.
    fn refuse(&mut self, key: usize) {
        if let State::Header(_, age) = self.streams.remove(key).state {
            self.unnamed.remove(age);
        }
    }

    /// Takes what one stream has, once. False when it had nothing more.
    fn read(&mut self, key: usize) -> bool {
        let Some(stream) = self.streams.get_mut(key) else {
            return false;
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = stream.socket.read(&mut buffer);
        let more = match result {
            Ok(n) if n > 0 => {
                self.take(key, &buffer[..n]);
                self.streams.contains(key)
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => false,
            // The end; a reset says the same.
            Ok(_) | Err(_) => {
                self.end_stream(key);
                false
            }
        };
        self.buffer = buffer;
        more
    }

    fn take(&mut self, key: usize, mut bytes: &[u8]) {
        let stream = &mut self.streams[key];
        if let State::Header(held, _) = &mut stream.state {
            let room = MAX_HEADER - held.len();
            let line = &bytes[..bytes.len().min(room)];
            let Some(end) = line.iter().position(|&b| b == b'\n') else {
                held.extend_from_slice(line);
                if held.len() == MAX_HEADER {
                    tracing::warn!("an output stream begins with an endless line; it is closed");
                    self.refuse(key);
                }
                return;
            };
            held.extend_from_slice(&line[..end]);
            let header = std::mem::take(held);
            if !self.begin(key, &header) {
                return self.refuse(key);
            }
            bytes = &bytes[end + 1..];
        }
        self.write(key, bytes);
    }

    /// The header line came; false: the stream is refused.
    fn begin(&mut self, key: usize, line: &[u8]) -> bool {
        let Some(header) = header::parse(line) else {
            // Not the token that it may have.
            let ends = line.iter().enumerate().filter(|(_, b)| **b == b' ');
            let shown = ends.map(|(at, _)| at).nth(1).unwrap_or(line.len());
            tracing::warn!(
                header = %line[..shown].escape_ascii(),
                "an output stream does not say whose it is; it is closed"
            );
            return false;
        };
        let container = header.container;
        let Some(log) = self.logs.get_mut(container).filter(|log| !log.closing) else {
            tracing::warn!(
                container,
                "an output stream of a container without a log; it is closed"
            );
            return false;
        };
        if header.token != log.token {
            tracing::warn!(
                container,
                "an output stream has not the token of the container that it names; it is closed"
            );
            return false;
        }
        log.streams += 1;
        let body = State::Body {
            container: container.to_owned(),
            framer: Framer::new(header.kind),
            in_old: false,
        };
        if let State::Header(_, age) = std::mem::replace(&mut self.streams[key].state, body) {
            self.unnamed.remove(age);
        }
        true
    }

    fn write(&mut self, key: usize, mut bytes: &[u8]) {
        let Some((log, framer, in_old)) = body(&mut self.streams, &mut self.logs, key) else {
            return;
        };
        let stamp = now();
        if *in_old && let Some(old) = &mut log.old {
            let used = framer.push_line(bytes, &stamp, &mut self.records);
            bytes = &bytes[used..];
            write_out(&mut old.file, &mut self.records);
            if !framer.mid_line() {
                self.left_old(key);
            }
        }
        let Some((log, framer, _)) = body(&mut self.streams, &mut self.logs, key) else {
            return;
        };
        framer.push(bytes, &stamp, &mut self.records);
        write_out(&mut log.file, &mut self.records);
    }

    fn end_stream(&mut self, key: usize) {
        if let Some((log, framer, in_old)) = body(&mut self.streams, &mut self.logs, key) {
            framer.finish(&now(), &mut self.records);
            let file = match &mut log.old {
                Some(old) if *in_old => &mut old.file,
                _ => &mut log.file,
            };
            write_out(file, &mut self.records);
        }
        self.left_old(key);
        // Only now is it closed: the guest takes that for an acknowledgment.
        let stream = self.streams.remove(key);
        match stream.state {
            State::Header(_, age) => self.unnamed.remove(age),
            State::Body { container, .. } => {
                if let Some(log) = self.logs.get_mut(&container) {
                    log.streams -= 1;
                }
                self.forget_if_done(&container);
            }
        }
    }

    fn finish(&mut self) {
        let keys: Vec<usize> = self.streams.iter().map(|(key, _)| key).collect();
        for key in keys {
            for _ in 0..FINISH_READS {
                if !self.read(key) {
                    break;
                }
            }
            if self.streams.contains(key) {
                self.end_stream(key);
            }
        }
    }
}

fn body<'a>(
    streams: &'a mut Slab<Stream>,
    logs: &'a mut HashMap<String, Log>,
    key: usize,
) -> Option<(&'a mut Log, &'a mut Framer, &'a mut bool)> {
    match &mut streams.get_mut(key)?.state {
        State::Header(..) => None,
        State::Body {
            container,
            framer,
            in_old,
        } => Some((logs.get_mut(container)?, framer, in_old)),
    }
}

fn write_out(file: &mut LogFile, records: &mut Vec<u8>) {
    if !records.is_empty() {
        file.write(records);
        records.clear();
        records.shrink_to(RECORDS_KEPT);
    }
}

/// RFC 3339 in UTC with nanoseconds, as CRI wants it.
fn now() -> String {
    humantime::format_rfc3339_nanos(SystemTime::now()).to_string()
}
